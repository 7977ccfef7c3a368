"""The torch.library that the ops are defined in, and Triton where the platform has it."""

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
except ImportError:  # no Triton on this platform: CPU tensors never need it
    triton = tl = None

LIBRARY = torch.library.Library("moecomm", "FRAGMENT")


ROOMS = Path(__file__).parents[1], Path(__file__).parents[2] / "compile"  # the ops and DTensor's rules for them


def checksum(*folders: Path) -> str:
    """The checksum of all sources in the folders and below them."""
    sources = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            sources.update(path.read_bytes())
    return sources.hexdigest()[:16]


# The caches of torch.compile know an op by its name alone (2.13): without this, a graph from before an upgrade would be loaded after it,
# with the backward that its ops had then. So the key has the checksum of what the compiler traces into after it has made the key. The tag
# is torch's own means for that; what the user has in it stays.
torch.compiler.config.cache_key_tag += f" moecomm {checksum(*ROOMS)}"


def jit(kernel: Callable[..., Any] | None = None, *, varies: Sequence[str] = ()) -> Any:
    """``triton.jit`` where there is Triton; the kernel untouched, and never launched, elsewhere.

    ``varies`` are the integer arguments that differ from call to call, such as T. Triton compiles a kernel anew for an argument that is 1,
    and for one that is a multiple of 16: two of them make up to nine kernels, compiled in the middle of a training. Those that stay as
    they are, such as D, or along which a kernel loads, are better left out.
    """
    if kernel is None:
        return partial(jit, varies=varies)
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=varies)


def on_its_device(cuda: Callable[..., Any]) -> Callable[..., Any]:
    """``cuda``, with the device of its first tensor that is on one as the current device.

    Triton launches on the current device, wherever its arguments are, and torch sets that for its own kernels alone.
    """

    @wraps(cuda)
    def call(*args: Any) -> Any:
        for arg in args:
            if isinstance(arg, Tensor) and arg.is_cuda:
                with torch.cuda._DeviceGuard(arg.get_device()):  # what Inductor's code uses: two calls into C
                    return cuda(*args)
        return cuda(*args)

    return call


def define(schema: str, fake: Callable[..., Any], cpu: Callable[..., Any], cuda: Callable[..., Any]) -> Any:
    """Define the op ``moecomm::<schema>`` with these implementations and give what calls it."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, on_its_device(cuda), "CUDA")
    torch.library.register_fake(f"moecomm::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.moecomm, name).default


def differentiable(op: Any, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give an op its backward: ``save(ctx, inputs, output)`` in the forward, then ``backward(ctx, *gradients)``."""
    torch.library.register_autograd(op.name(), backward, setup_context=save, lib=LIBRARY)


def block_of(size: int, most: int) -> int:
    """The block size for ``size`` elements: a power of two, at least 16 and at most ``most``."""
    return max(16, min(most, 1 << max(size - 1, 0).bit_length()))


def compute_dtype(dtype: torch.dtype) -> Any:
    """What a kernel accumulates ``dtype`` in: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def tokens_a_block(k: int) -> int:
    """32, or fewer where a token has more than 256 slots: what a kernel has of a block, [tokens, K], stays in registers."""
    return max(1, 8192 >> max(8, (k - 1).bit_length()))
