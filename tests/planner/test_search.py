"""What a search must give: every legal split once, the fastest first, a reason for each that does not fit; and it moves as it must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moecomm.planner import PRESETS, Model, Table, assess, read_config, search, splits
from moecomm.planner.__main__ import main
from moecomm.planner.cost import RECOMPUTE
from moecomm.planner.splits import misfits
from tests.planner.configs import DEEPSEEK, GPT_OSS, QWEN3

MODEL = Model(
    layers=6, dim=1024, hidden=512, experts=16, k=4, heads=8, kv_heads=4, head=128, vocabulary=32000, dense_layers=1, dense_hidden=2048,
    sequence=1024, batch=48,
)  # fmt: skip
H100 = PRESETS["h100"]
LOADS = np.random.default_rng(0).integers(1, 100, (5, 16))


@pytest.fixture(scope="module")
def table() -> Table:
    return search(MODEL, H100, LOADS, ranks=8)


def test_every_legal_split_is_there_with_every_way_and_every_other_with_its_reason(table: Table) -> None:
    legal = {split for split in splits(8) if not misfits(split, MODEL)}
    ways = [(row.split, row.way.fp8, row.way.static, row.way.recompute) for row in table.rows]
    ways += [(each.split, each.way.fp8, each.way.static, each.way.recompute) for each in table.unfit if each.way]
    assert len(ways) == len(set(ways)) == len(legal) * 2 * 2 * 3
    assert {split for split, *_ in ways} == legal
    assert {each.split for each in table.unfit if each.way is None} == set(splits(8)) - legal
    assert all(each.why for each in table.unfit)


def test_the_table_is_ranked_and_its_parts_add_up(table: Table) -> None:
    seconds = [row.seconds for row in table.rows]
    assert seconds == sorted(seconds)
    for row in table.rows[::7]:
        assert sum(row.times) == pytest.approx(row.seconds)
        assert min(row.times) >= 0
        assert row.memory.total() <= H100.memory
        assert row.tokens_per_second == pytest.approx(48 * 1024 / row.seconds)


def test_a_row_is_the_best_of_its_numbers_of_microbatches(table: Table) -> None:
    for row in table.rows[::11]:
        own = MODEL.batch // row.split.dp
        candidates = [(row.split, row.way._replace(microbatches=m)) for m in range(row.split.pp, own + 1) if own % m == 0]
        fitting = [each for each in assess(MODEL, H100, candidates, LOADS) if each.memory.total() <= H100.memory]
        assert row.seconds == pytest.approx(min(each.seconds for each in fitting))


def seconds_of(table: Table) -> dict[Any, float]:
    return {(row.split, row.way): row.seconds for row in table.rows}


def test_more_skew_is_never_faster_and_shifts_the_ranking() -> None:
    hot = np.zeros(16)
    hot[3] = 1
    before = None
    for skew in (0.0, 0.1, 0.3, 0.6):
        found = search(MODEL, H100, np.tile((1 - skew) / 16 + skew * hot, (5, 1)), ranks=8, microbatches=[6], recompute=["none"])
        now = seconds_of(found)
        if before is not None:
            assert all(now[key] >= before[key] * (1 - 1e-12) for key in now)
        before = now
    even, skewed = (search(MODEL, H100, loads, ranks=8).rows[0].split for loads in (None, np.tile(hot + 0.01, (5, 1))))
    assert even.ep >= skewed.ep


def test_more_memory_never_fits_fewer_and_the_fastest_is_never_slower() -> None:
    fits: list[int] = []
    fastest: list[float] = []
    for gigabytes in (0.5, 1, 2, 4, 80):
        found = search(MODEL, H100._replace(memory=gigabytes * 1e9), ranks=8)
        fits.append(len(found.rows))
        fastest.append(found.rows[0].seconds if found.rows else float("inf"))
        assert all("of " in each.why and "activations" in each.why for each in found.unfit if each.way)
    assert fits == sorted(fits)
    assert fits[0] < fits[-1]
    assert fastest == sorted(fastest, reverse=True)


def sizes_in(line: str) -> list[int]:
    """The sizes of both views in a line of the table."""
    return [int(size) for size in " ".join(line.split("|")[:2]).split()]


@pytest.mark.slow
def test_the_data_is_plain_and_the_text_and_the_picture_show_the_best(table: Table, tmp_path: Path) -> None:
    again = json.loads(json.dumps(table.to_dict()))
    assert again["rows"][0]["split"] == table.rows[0].split._asdict()
    assert set(again["rows"][0]["times"]) == set(table.rows[0].times._fields)
    assert len(again["unfit"]) == len(table.unfit)
    best = table.rows[0]
    first = str(table).splitlines()[2]
    assert sizes_in(first) == list(best.split)
    assert RECOMPUTE[best.way.recompute] in first
    table.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": 12}, "ranks was 12"),
        ({"ranks": 0}, "ranks was 0"),
        ({"wires": ["fp4"]}, "wires was"),
        ({"plans": []}, "plans was"),
        ({"recompute": ["half"]}, "recompute was"),
        ({"loads": np.ones((6, 16))}, "loads was of shape"),
    ],
)
def test_what_a_search_cannot_take_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(MODEL, H100, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "nodes"), [(QWEN3, 2), (DEEPSEEK, 32)])
def test_the_command_prints_a_table_and_the_call_to_paste(
    config: dict[str, Any], nodes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert main(["--config", str(file), "--cluster", "b200", "--nodes", str(nodes), "--batch", "256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"{8 * nodes} ranks of b200")
    pp, dp, cp, tp, _, ep, etp = sizes_in(lines[3])
    assert lines[-1] == f'mesh = moe_mesh("cuda", pp={pp}, dp={dp}, cp={cp}, tp={tp}, ep={ep}, etp={etp})'


@pytest.mark.slow
def test_the_command_writes_what_it_found(tmp_path: Path) -> None:
    file, data, picture = (tmp_path / name for name in ("config.json", "table.json", "plot.png"))
    file.write_text(json.dumps(GPT_OSS))
    np.save(tmp_path / "loads.npy", np.ones((24, 32)))
    main(["--config", str(file), "--loads", str(tmp_path / "loads.npy"), "--plot", str(picture), "--json", str(data)])
    table = search(read_config(GPT_OSS), H100, np.ones((24, 32)))
    assert json.loads(data.read_text()) == json.loads(json.dumps(table.to_dict()))
    assert picture.stat().st_size > 10_000


def test_the_command_says_what_is_missing_where_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(DEEPSEEK))
    assert main(["--config", str(file)]) == 1
    assert "nothing fits; least is missing with moe_mesh(" in capsys.readouterr().out
    file.write_text(json.dumps(GPT_OSS | {"model_type": "gpt2"}))
    with pytest.raises(SystemExit):
        main(["--config", str(file)])
    assert "model_type" in capsys.readouterr().err


def test_a_config_of_each_model_has_a_plan_on_enough_gpus() -> None:
    for name in PRESETS:
        assert search(read_config(QWEN3), PRESETS[name], ranks=16, microbatches=[32], plans=["dynamic"]).rows
