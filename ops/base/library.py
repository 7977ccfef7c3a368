"""The torch.library in which the ops are defined, and Triton if the platform has it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # this platform has no Triton; CPU tensors never need it
    triton = tl = None

LIBRARY = torch.library.Library("moecomm", "FRAGMENT")
UNROLLED = 8  # the slots of a token whose rows a kernel reads or writes without waiting for one another

ROOMS = Path(__file__).parents[1], Path(__file__).parents[2] / "compile"  # the ops, and the DTensor rules for them


def checksum(*folders: Path) -> str:
    """The checksum of all Python sources in the folders and their subfolders."""
    sources = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            sources.update(path.read_bytes())
    return sources.hexdigest()[:16]


# The caches of torch.compile identify an op by its name only (torch 2.13). After an upgrade of moecomm they would load an old graph, with
# the old backward of its ops. So the cache key includes a checksum of the code that the compiler traces into after it has made the key.
# cache_key_tag is torch's own setting for this; the user's own value stays in it.
torch.compiler.config.cache_key_tag += f" moecomm {checksum(*ROOMS)}"


def jit(kernel: Callable[..., Any] | None = None, *, varies: Sequence[str] = ()) -> Any:
    """``triton.jit`` if Triton is there. Without Triton it returns the kernel unchanged; such a kernel is never launched.

    ``varies`` names the integer arguments that differ from call to call, such as T. Triton compiles a kernel again for an
    argument that is 1, and for one that is a multiple of 16. Two such arguments give up to nine kernels, compiled in the middle
    of a training. Leave out arguments that stay constant, such as D, and those along which a kernel loads.
    """
    if kernel is None:
        return partial(jit, varies=varies)
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=varies)


def on_its_device(cuda: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``cuda`` with the device of its first CUDA tensor as the current device.

    Triton launches on the current device, wherever the arguments are. Torch sets the current device for its own kernels only.
    """

    @wraps(cuda)
    def call(*args: Any) -> Any:
        for arg in args:
            if isinstance(arg, Tensor) and arg.is_cuda:
                with torch.cuda._DeviceGuard(arg.get_device()):  # Inductor's code uses the same: two calls into C
                    return cuda(*args)
        return cuda(*args)

    return call


def define(schema: str, fake: Callable[..., Any], cpu: Callable[..., Any], cuda: Callable[..., Any]) -> Any:
    """Define the op ``moecomm::<schema>`` with these implementations, and return its callable."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, on_its_device(cuda), "CUDA")
    torch.library.register_fake(f"moecomm::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.moecomm, name).default


def differentiable(op: Any, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give an op its backward: ``save(ctx, inputs, output)`` runs in the forward, then ``backward(ctx, *gradients)``."""
    torch.library.register_autograd(op.name(), backward, setup_context=save, lib=LIBRARY)


def block_of(size: int, most: int) -> int:
    """The block size for ``size`` elements: a power of two, at least 16 and at most ``most``."""
    return max(16, min(most, 1 << max(size - 1, 0).bit_length()))


def compute_dtype(dtype: torch.dtype) -> Any:
    """The dtype in which a kernel accumulates ``dtype``: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def tokens_a_block(k: int) -> int:
    """The tokens of a kernel's block: 32, or fewer if a token has more than 256 slots.

    So a kernel's tensor [tokens, K] stays in registers.
    """
    return max(1, 8192 >> max(8, (k - 1).bit_length()))
