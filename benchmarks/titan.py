"""How fast is torchtitan's MoE layer with moecomm's token dispatcher, relative to torchtitan's own all-to-all dispatcher, in one run?

    make build/torchtitan/.ready && build/torchtitan/bin/python -m benchmarks.titan

Both are the ones that torchtitan's layer calls, on 4 gloo ranks of one thread each, forward and backward. The experts return their rows
unchanged, or they are torchtitan's own, of the size of Qwen3's debug model and in float32: CPUs without matmuls in bfloat16 are 20 times as
slow there. The results and gradients of both are compared before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.inputs import routed
from benchmarks.layer import DIM, DTYPES, EXPERTS, RANKS, TOKENS, TOP_K
from benchmarks.peers import MOECOMM
from benchmarks.timing import INSTALLED, WARM, Line, command, compared, interleaved, said
from tests.spawn import run_ranks

TITAN = "torchtitan"
REPEATS, WHOLE_REPEATS = {WARM: 11, INSTALLED: 7}, 25  # of most of a second each
DEBUG = {"tokens": 256, "dim": 256, "hidden": 768, "experts": EXPERTS, "k": 8}  # Qwen3's debug model; tokens of a rank
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the largest: torchtitan rounds each weighted row and each sum of two


def main() -> None:
    command("titan", measure, sizes, __doc__)


def sizes(device: str) -> Line:
    return {"ranks": RANKS, "tokens": TOKENS, "dim": DIM, "experts": EXPERTS, "own experts": DEBUG}


def measure(device: str, memory: str) -> list[Line]:
    if device == "cuda":
        raise SystemExit("benchmarks.titan runs on gloo ranks: --device cpu")
    lines = []
    for dtype in DTYPES:
        for k in TOP_K:
            lines += said(run_ranks(around, RANKS, dtype, k, REPEATS[memory], timeout=600)[0], memory)
    return lines + said(run_ranks(whole, RANKS, WHOLE_REPEATS, timeout=600)[0], memory)


def around(dtype: torch.dtype, k: int, repeats: int) -> list[Line]:
    """The dispatchers alone: the experts return their rows."""
    x, ids, weights, grad = routed(TOKENS, DIM, EXPERTS, k, dtype)
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)

    def step(dispatcher: object) -> tuple[Tensor, ...]:
        rows, _, metadata = dispatcher.dispatch(x, weights, ids, counts)  # type: ignore[attr-defined]
        y = dispatcher.combine(rows, metadata, x)  # type: ignore[attr-defined]
        return y, *torch.autograd.grad(y, (x, weights), grad)

    steps = {name: partial(step, each) for name, each in dispatchers(EXPERTS, k).items()}
    base = {"what": "experts that return their rows", "dtype": str(dtype).removeprefix("torch."), "k": k}
    return [timed(steps, TOLERANCE[dtype], repeats) | base]


def whole(repeats: int) -> list[Line]:
    """torchtitan's routed experts, whole."""
    from torchtitan.models.common.config_utils import make_routed_experts_config

    tokens, dim, hidden, experts, k = DEBUG.values()
    x, ids, weights, grad = (each.unsqueeze(0) for each in routed(tokens, dim, experts, k, torch.float32))
    counts = torch.bincount(ids.flatten(), minlength=experts)
    layer = make_routed_experts_config(
        dim=dim, hidden_dim=hidden, num_experts=experts // RANKS, top_k=k, param_init={}, comm_backend="standard"
    ).build()  # the experts of this rank
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    def step(dispatcher: object) -> tuple[Tensor, ...]:
        layer.token_dispatcher = dispatcher
        y = layer(x, weights, ids, counts)
        return y, *torch.autograd.grad(y, (x, weights, *layer.parameters()), grad)

    steps = {name: partial(step, each) for name, each in dispatchers(experts, k).items()}
    with patch.object(Tensor, "bfloat16", Tensor.float):  # which the experts call
        return [timed(steps, TOLERANCE[torch.float32], repeats) | {"what": "torchtitan's experts", "dtype": "float32"} | DEBUG]


def dispatchers(experts: int, k: int) -> dict[str, object]:
    """moecomm's and torchtitan's, over all ranks."""
    from torchtitan.distributed.utils import set_spmd_backend
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

    from moecomm.integrations.torchtitan import TokenDispatcher

    set_spmd_backend("partial_dtensor")  # the exchanges of the other one do not run on gloo
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    made = {MOECOMM: TokenDispatcher, TITAN: AllToAllTokenDispatcher}
    here = {name: each.Config(num_experts=experts, top_k=k).build() for name, each in made.items()}
    for dispatcher in here.values():
        dispatcher.wire_meshes(ep_mesh=mesh)
    return here


def timed(steps: dict[str, Callable[[], tuple[Tensor, ...]]], tolerance: float, repeats: int) -> Line:
    """torchtitan's time to moecomm's, of steps that give the same."""
    for got, want in zip(steps[MOECOMM](), steps[TITAN](), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())
    return compared(interleaved(steps, "cpu", repeats), TITAN, MOECOMM)


if __name__ == "__main__":
    main()
