"""What the documents show runs: the first snippets, the tutorials on one process and on several. Every file that they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.scripts import run_script

ROOT = Path(__file__).parents[2]
LAYER = "tutorials/01_your_own_moe_layer.py"
PARALLELISM = "tutorials/02_parallelism.py"
FROM_FASTMOE = "tutorials/03_from_fastmoe.py"
TWO_LEVELS = "tutorials/05_two_levels.py"
PLANNER = "tutorials/06_planner.py"
TRANSFORMERS = "tutorials/07_transformers.py"
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
INSTALLED = {"moecomm/ops/": "ops/", "moecomm/compile/": "compile/"}  # where the files of an installed package are in this repository


@pytest.mark.parametrize("document", ["README.md", "docs/functions.md", ".github/pypi.md"])
def test_the_snippets_of_a_document_run(document: str) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        names: dict[str, object] = {}
        exec(snippet, names)
        assert names["y"].shape == names["x"].shape  # type: ignore[attr-defined]


def errors(printed: str) -> dict[str, float]:
    """The errors that a tutorial prints."""
    return {name: float(error) for name, error in re.findall(r"(\w+): mean squared error (\S+)", printed)}


@pytest.mark.slow
def test_the_tutorial_trains_a_better_layer_and_the_same_one_on_two_ranks(tmp_path: Path) -> None:
    alone = errors(run_script(ROOT / LAYER, 1, tmp_path, force_backend="aot_eager"))
    together = errors(run_script(ROOT / LAYER, 2, tmp_path, stance="force_eager"))  # compiled, it is the same layer
    assert alone["moe"] < 0.7 * alone["dense"]
    # 300 steps of AdamW carry the rounding of sums in another order to some percent of the error.
    assert together == {name: pytest.approx(error, rel=0.1) for name, error in alone.items()}


def on_four_ranks(script: str, folder: Path, ways: int) -> str:
    """What a tutorial prints that compares so many ways with one process, in float64: only the order of sums differs."""
    printed = run_script(ROOT / script, 4, folder)
    differences = [float(found) for found in re.findall(r"differs from one process by (\S+)", printed)]
    assert len(differences) == ways
    assert max(differences) < 1e-13
    return printed


@pytest.mark.slow
def test_every_way_of_the_tutorial_on_parallelism_is_as_one_process(tmp_path: Path) -> None:
    on_four_ranks(PARALLELISM, tmp_path, 7)
    assert (tmp_path / "runs" / "parallelism.png").stat().st_size > 10_000


@pytest.mark.slow
def test_tokens_cross_between_nodes_once_in_the_tutorial_on_two_levels(tmp_path: Path) -> None:
    printed = on_four_ranks(TWO_LEVELS, tmp_path, 3)
    one, two = map(int, re.findall(r"nodes: (\d+) with one plan, (\d+) with two", printed)[0])
    assert 0 < two <= 48 < one  # of 48 tokens


@pytest.mark.slow
def test_experts_that_move_keep_the_ranks_of_the_tutorial_balanced(tmp_path: Path) -> None:
    printed = run_script(ROOT / PLANNER, 4, tmp_path)
    still, moved = map(float, re.findall(r"mean: (\S+) without moves, (\S+) with", printed)[0])
    assert moved < 1.4 < 2 < still
    assert float(re.findall(r"difference of a loss: (\S+)", printed)[0]) < 1e-5  # float32: only the order of sums differs
    assert (tmp_path / "runs" / "planner.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_tutorial_for_users_of_fastmoe_trains_the_same_on_four_ranks(tmp_path: Path) -> None:
    # Both print four digits; ten steps in bfloat16 agreed in all of them.
    alone, together = (errors(run_script(ROOT / FROM_FASTMOE, ranks, tmp_path))["it"] for ranks in (1, 4))
    assert together == pytest.approx(alone, rel=5e-3)


@pytest.mark.exhaustive
def test_a_model_of_transformers_trains_on_four_ranks_and_loads_without_moecomm(tmp_path: Path) -> None:
    printed = run_script(ROOT / TRANSFORMERS, 4, tmp_path)
    after, unigram = map(float, re.findall(r"byte: (\S+) after .* a unigram has ([\d.]+)", printed)[0])
    assert after < unigram
    assert float(re.findall(r"difference of a logit: (\S+)", printed)[0]) < 1e-4
    assert "moecomm" not in (tmp_path / "runs" / "transformers" / "trained" / "config.json").read_text()


def test_the_first_tutorial_is_short() -> None:
    assert len((ROOT / LAYER).read_text().splitlines()) < 120


def in_repository(name: str) -> Path:
    """Where a file is that text names by its path in the repository or in the installed package."""
    for installed, here in INSTALLED.items():
        if name.startswith(installed):
            return ROOT / here / name.removeprefix(installed)
    return ROOT / name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    linked = {name: (ROOT / document).parent / name for name in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)}
    quoted = re.findall(r"`((?:moecomm|ops|compile|tests|tutorials|benchmarks|docs)/[\w./-]+)`", text)
    named = linked | {name: in_repository(name) for name in quoted}
    assert named
    assert [name for name, file in named.items() if not file.exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_that_a_document_names_exist(document: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:`|^)make ([a-z][\w-]*)", (ROOT / document).read_text(), re.MULTILINE)
    assert set(named) <= targets
