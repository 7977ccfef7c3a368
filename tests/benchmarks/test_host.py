"""The benchmark of the host's time: what it calls, what its clock covers, and its table."""

from __future__ import annotations

import itertools
from functools import partial
from unittest.mock import patch

import torch

from benchmarks import figures, host, timing


def test_each_call_is_measured_beside_the_forward_pass_of_k_fold() -> None:
    with patch.multiple(host, REPEATS=2, CALLS={"cpu": 1}):
        lines = host.calls("cpu", torch.float32, host.Sizes(16, 8, 8, 2))
    assert [line["case"] for line in lines] == [
        "plan", "plan, static", "dispatch", "combine", "step", host.HERE, host.STATIC, "k_fold, step"
    ]  # fmt: skip
    assert {line["to"] for line in lines} == {host.FORWARD}
    assert all(0 < line["low"] <= line["ratio"] <= line["high"] for line in lines)


def test_a_time_is_that_of_one_call() -> None:
    made = []
    host.again(partial(made.append, 1), 3)
    assert made == [1, 1, 1]

    def three_seconds(cases: dict[str, object], device: str, repeats: int) -> dict[str, list[float]]:
        assert device == "cpu"  # the host's clock
        return dict.fromkeys(cases, [3.0] * repeats)

    with patch.multiple(host, CALLS={"cpu": 3}, interleaved=three_seconds):
        lines = host.calls("cpu", torch.float32, host.Sizes(16, 8, 8, 2))
    assert all(line["milliseconds"] == [1000.0, 1000.0] for line in lines)


def test_the_hosts_clock_starts_when_the_gpu_is_idle_and_waits_for_nothing() -> None:
    order, ticks = [], itertools.count()

    def clock() -> int:
        order.append("clock")
        return next(ticks)

    with (
        patch("torch.cuda.is_initialized", return_value=True),
        patch("torch.cuda.synchronize", side_effect=partial(order.append, "idle")),
        patch.object(timing.time, "perf_counter", clock),
    ):
        timing.interleaved({"a": partial(order.append, "call")}, "cpu", 1)
    assert order == ["idle", "clock", "call", "clock"] * 2  # one warms up


def test_the_backward_pass_may_run_on_the_calling_thread() -> None:
    assert host.on_this_thread(torch._C._is_multithreading_enabled) is False
    assert torch._C._is_multithreading_enabled()


def test_warm_memory_alone_is_measured() -> None:
    assert host.measure("cpu", timing.INSTALLED) == []


def test_targets_are_for_gpus_and_in_microseconds() -> None:
    taken = {"plan": 0.13, "plan, static": 0.1, "dispatch": 0.044, "combine": 0.046, "step": 0.4, host.HERE: 0.3, host.STATIC: 0.9}
    lines = [
        timing.compared({case: [ms / 1e3] * 3, host.FORWARD: [2e-4] * 3}, case, host.FORWARD)
        | {"what": "host", "dtype": "bfloat16", "memory": timing.WARM}
        | host.SIZES._asdict()
        for case, ms in taken.items()
    ]
    about = {"device": "some", "python": "3", "packages": {"torch": "2"}, "seconds": 1.0, "load before": 0.0}
    heading, write = figures.SECTIONS["host"]
    assert heading == "Host time of eager calls"
    on_gpu, on_cpu = (write({"about": about | {"on": device}, "lines": lines}) for device in ("cuda", "cpu"))
    sizes = "T = 256, D = 512, E = 16, K = 4"
    for row in (
        f"| plan | 0.65 (0.65 to 0.65) | <= 120 us: **not met** | 130 / 200 | {sizes} |",
        f"| plan, static | 0.50 (0.50 to 0.50) |  | 100 / 200 | {sizes} |",
        f"| dispatch | 0.22 (0.22 to 0.22) | <= 45 us: met | 44 / 200 | {sizes} |",
        f"| combine | 0.23 (0.23 to 0.23) | <= 45 us: **not met** | 46 / 200 | {sizes} |",
        f"| step | 2.00 (2.00 to 2.00) | <= 500 us: met | 400 / 200 | {sizes} |",
    ):
        assert f"| warm | bfloat16 {row}" in on_gpu
    assert on_gpu.count("met") == 4
    assert "met" not in on_cpu
