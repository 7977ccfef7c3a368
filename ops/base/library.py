"""The torch.library in which the ops are defined, and how eager code calls them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.compiler.config
from torch import Tensor

from moecomm.ops.base.kernels import inlined, jit, tl

__all__ = [
    "LIBRARY",
    "UNROLLED",
    "block_of",
    "call",
    "compute_dtype",
    "define",
    "differentiable",
    "direct",
    "direct_function",
    "inlined",
    "jit",
    "tl",
    "tokens_a_block",
    "trusting",
]
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


class _Direct(NamedTuple):
    """What runs where the dispatcher is passed by: on the CPU, on a GPU, and where a gradient is required."""

    cpu: Callable[..., Any]
    cuda: Callable[..., Any]
    apply: Callable[..., Any] | None


_DIRECT: dict[int, _Direct] = {}  # by the id of an op, which lives as long as its library: torch hashes ops in Python
_KEYS, _KEY = torch._C.DispatchKeySet, torch._C.DispatchKey
_EAGER = _KEYS(_KEY.BackendSelect)
# The states of torch's dispatcher in which it has nothing to do: no mode, no transform, no tracing; the first in inference mode.
_IDLE = {_EAGER.raw_repr(), (_EAGER | _KEYS(_KEY.ADInplaceOrView)).raw_repr()}
_PLAIN = (Tensor, torch.nn.Parameter)  # the types of plain tensors: a subclass may do anything


class _Trust(threading.local):
    """Whether this thread is inside `trusting`, and then whether its tensors are on a GPU."""

    cuda: bool | None = None


_TRUST = _Trust()


def call(op: Any, *args: Any) -> Any:
    """``op(*args)``. In plain eager code the op's implementation runs at once, without torch's dispatcher and its Python.

    That saves some 30 us of host time without a gradient, and 60 with one (torch 2.11). The dispatcher gets the op where a mode, a
    transform, a tracer or a profiler wants to see it, or a tensor is not a plain one on the CPU or a GPU.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    cuda = _TRUST.cuda
    if cuda is None:
        cuda = _on_cuda(args)
        if cuda is None:
            return op(*args)
    on_cpu, on_cuda, apply = _DIRECT[id(op)]
    here = on_cuda if cuda else on_cpu
    if not torch.is_grad_enabled() or not any(type(arg) in _PLAIN and arg.requires_grad for arg in args):
        return here(*args)
    if apply is not None:
        return _trusting(cuda, apply, *args)
    with torch.no_grad():
        return here(*args)


def trusting(tensors: Iterable[Any], function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``. If `call` may pass the dispatcher by for ``tensors``, it does so for every op inside, and looks no more.

    ``function`` makes all other tensors that it passes to ops itself, of these.
    """
    cuda = None if torch.compiler.is_compiling() else _on_cuda(tensors)
    return function(*args) if cuda is None else _trusting(cuda, function, *args)


def _trusting(cuda: bool, function: Callable[..., Any], *args: Any) -> Any:
    before, _TRUST.cuda = _TRUST.cuda, cuda
    try:
        return function(*args)
    finally:
        _TRUST.cuda = before


def _on_cuda(args: Iterable[Any]) -> bool | None:
    """Whether a tensor of ``args`` is on a GPU; None if the dispatcher has to see an op on them."""
    if not _idle():
        return None
    cuda = False
    for arg in args:
        if isinstance(arg, Tensor):
            if not _plain(arg):
                return None
            cuda = cuda or arg.is_cuda
    return cuda


def direct(op: Any, cpu: Callable[..., Any], cuda: Callable[..., Any], apply: Callable[..., Any] | None) -> Any:
    """Let `call` run an op by these; returns the op."""
    _DIRECT[id(op)] = _Direct(cpu, cuda, apply)
    return op


class _Unsaved:
    """The context of an autograd.Function whose backward nobody will call."""

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


def direct_function(op: Any, function: type[torch.autograd.Function]) -> Any:
    """Let `call` run an op that is an autograd.Function of other ops: without a gradient its forward alone, which takes 8 us less."""

    def forward(cuda: bool, *args: Any) -> Any:
        return _trusting(cuda, function.forward, _Unsaved(), *args)

    return direct(op, partial(forward, False), partial(forward, True), _apply(function))


def _apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Its apply, without the part in Python: that is for transforms, which `call` leaves to the dispatcher. It takes half the time."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def _idle() -> bool:
    """Whether nothing but the op's implementation has to run: what makes graphs, counts or watches ops shows in these flags."""
    return (
        torch._C._dispatch_tls_local_include_set().raw_repr() in _IDLE
        and not torch._C._is_torch_function_mode_enabled()
        and not torch.autograd._profiler_enabled()
    )


def _plain(tensor: Tensor) -> bool:
    """Whether it is a strided tensor on the CPU or a GPU, as it seems, with nothing to be done before it is read."""
    return (
        type(tensor) in _PLAIN
        and (tensor.is_cpu or tensor.is_cuda)
        and tensor.layout is torch.strided
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.is_nested
        and not tensor._is_zerotensor()
    )


def define(schema: str, fake: Callable[..., Any], cpu: Callable[..., Any], cuda: Callable[..., Any]) -> Any:
    """Define the op ``moecomm::<schema>`` with these implementations, and return its callable. `call` calls it."""
    name = schema[: schema.index("(")]
    guarded = on_its_device(cuda)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, guarded, "CUDA")
    torch.library.register_fake(f"moecomm::{name}", fake, lib=LIBRARY)
    return direct(getattr(torch.ops.moecomm, name).default, cpu, guarded, None)


def differentiable(op: Any, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give an op its backward: ``save(ctx, inputs, output)`` runs in the forward, then ``backward(ctx, *gradients)``."""
    torch.library.register_autograd(op.name(), backward, setup_context=save, lib=LIBRARY)
    cpu, cuda, _ = _DIRECT[id(op)]

    def forward(ctx: Any, *args: Any) -> Any:
        output = (cuda if any(isinstance(arg, Tensor) and arg.is_cuda for arg in args) else cpu)(*args)
        save(ctx, args, output)
        return output

    named = {"forward": staticmethod(forward), "backward": staticmethod(backward)}  # the name is seen in graphs of autograd and in profiles
    direct(op, cpu, cuda, _apply(type(f"moecomm_{op.name().split('::')[1]}", (torch.autograd.Function,), named)))


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
