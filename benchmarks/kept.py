"""What does a layer with SwiGLU experts keep for its backward pass, beyond its inputs and parameters?

    python -m benchmarks.kept              # or: make bench
    python -m benchmarks.kept --device cuda

In bfloat16, on one process: the bytes that are still allocated after the forward pass, without its result. They are relative to N * 2 H,
the result of the experts' first matmul. On several ranks the tokens that came from the others, R * D, are added.

- "weighted": the experts as a black box, and their rows weighted by `combine`.
- "lean": the experts multiply `row_weights` in. In eager mode the activation is then computed in float32.
- "save_matmuls": the same in a checkpoint with this policy.
- "compiled": as torch's partitioner divides the graph, and as `keep_less` does. The graphs then run as they are: Inductor keeps the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu_peers import wholes
from benchmarks.inputs import routed
from benchmarks.peers import MOECOMM, ON_ONE
from benchmarks.timing import WARM, Line, command, exact, held, said
from benchmarks.whole import Sizes, Whole, check_whole, lean, matrices, with_experts
from moecomm.compile.checkpoint import contexts, save_matmuls
from moecomm.compile.keep_less import keep_less

ON_CPU = (Sizes(512, 512, 192, 16, 8),)
ON_GPU = (Sizes(16384, 2048, 768, 128, 8), Sizes(32768, 1536, 256, 128, 8), Sizes(8192, 7168, 2048, 64, 8))
LEAST = "N * 2 H"


def main() -> None:
    command("kept", measure, lambda device: {"sizes": [each._asdict() for each in sizes(device)]}, __doc__)


def sizes(device: str) -> Sequence[Sizes]:
    return ON_GPU if device == "cuda" else ON_CPU


def measure(device: str, memory: str) -> list[Line]:
    """Bytes depend on no setting."""
    return [line for size in sizes(device) for line in said(layer_keeps(device, size), memory)] if memory == WARM else []


def layer_keeps(device: str, size: Sizes) -> list[Line]:
    x, experts, weights, _ = routed(size.tokens, size.dim, size.experts, size.k, torch.bfloat16, device)
    given = x, experts, weights, *matrices(size, device)
    least = experts.numel() * 2 * size.hidden * x.itemsize
    eager = EAGER | wholes(device, torch.bfloat16)
    for way in eager.values():
        check_whole(way, torch.bfloat16, device)
    lines = []
    graphs = {name: compiled(*way) for name, way in COMPILED.items()}
    for name, way in (eager | graphs).items():
        forward: Callable[[], Tensor] = partial(way, *given)
        y = forward()
        if name in COMPILED:
            torch.testing.assert_close(y, COMPILED[name][0](*given), rtol=0, atol=0.01 * y.abs().max().item())
        lines.append(exact(name, LEAST, held(forward, device), least) | {"what": "kept", "dtype": "bfloat16"} | size._asdict())
    return lines


def checkpointed(*given: Tensor) -> Tensor:
    return checkpoint(lean, *given, use_reentrant=False, context_fn=partial(contexts, save_matmuls))


EAGER: dict[str, Whole] = {
    "moecomm, weighted": with_experts(ON_ONE[MOECOMM]),
    "moecomm, lean": lean,
    "moecomm, lean, save_matmuls": checkpointed,
    "k_fold": with_experts(ON_ONE["k_fold"]),
    "by_expert": with_experts(ON_ONE["by_expert"]),
}
COMPILED: dict[str, tuple[Whole, Any]] = {
    "moecomm, weighted, compiled": (with_experts(ON_ONE[MOECOMM]), min_cut_rematerialization_partition),
    "moecomm, lean, compiled": (lean, min_cut_rematerialization_partition),
    "moecomm, lean, compiled, save_matmuls": (checkpointed, min_cut_rematerialization_partition),
    "moecomm, lean, compiled, keep_less": (lean, keep_less),
}


def compiled(way: Whole, partition: Any) -> Whole:
    def run(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=run, bw_compiler=run, partition_fn=partition, decompositions=select_decomp_table())
    return torch.compile(way, fullgraph=True, backend=backend)


if __name__ == "__main__":
    main()
