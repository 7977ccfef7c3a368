"""Watch a run without changing it: what it compiles, sends, reads on the host and keeps for its backward pass.

Compilation is watched through torch's structured trace, which TORCH_TRACE writes to files. Ops are
watched through a dispatch mode. It also sees the ops of compiled code, and the compiler leaves it
alone.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

import moecomm
import moecomm.ops
from moecomm.ops.exchange.start_op import STARTS
from moecomm.ops.routing.read_sizes import plan_sizes, read_sizes

# Ops that wait for the device, because the host must know their result or its shape.
READ_OPS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal", "bincount"}
READ_CALLS = {"cpu", "numpy", "tolist"}  # calls that run no op if the tensor is on the CPU already
PYTHON, *LIBRARIES = (
    os.path.dirname(str(file)) + os.sep for file in (os.__file__, torch.__file__, moecomm.__file__, moecomm.ops.__file__, __file__)
)


class Break(NamedTuple):
    place: str  # file:line
    reason: str


class Recompile(NamedTuple):
    place: str  # file:line of the function
    function: str
    cause: str  # the guard that failed


class Sync(NamedTuple):
    op: str
    phase: str  # "forward" or "backward"
    place: str  # file:line in the user's code; in a compiled run, where the compiled code was called


class Collective(NamedTuple):
    op: str
    phase: str
    bytes: int  # that this rank receives, also from itself
    place: str


class Run(NamedTuple):
    """One forward and backward pass."""

    syncs: list[Sync]
    collectives: list[Collective]
    saved: int  # bytes kept for the backward pass, without parameters and arguments


class Compiling(logging.Handler):
    """What torch.compile does inside the block: ``with Compiling() as compiling``."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.graphs, self.seconds = 0, 0.0
        self.breaks: list[Break] = []
        self.recompiles: list[Recompile] = []

    def __enter__(self) -> Compiling:
        logging.getLogger("torch.__trace").addHandler(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        logging.getLogger("torch.__trace").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        told: dict[str, Any] = getattr(record, "metadata", {})
        self.graphs += "dynamo_output_graph" in told
        if told.get("artifact", {}).get("name") == "dynamo_graph_break_reason":
            found = _break(str(getattr(record, "payload", "")))
            if found not in self.breaks:  # a frame that is traced again after a break reports it again
                self.breaks.append(found)
        for name in ("compilation_metrics", "bwd_compilation_metrics"):
            metrics = told.get(name, {})
            self.seconds += (metrics.get("duration_us") or 0) / 1e6
            if metrics.get("recompile_reason"):
                place = f"{metrics['co_filename']}:{metrics['co_firstlineno']}"
                self.recompiles.append(Recompile(place, metrics["co_name"], " ".join(str(metrics["recompile_reason"]).split())))


def _break(text: str) -> Break:
    """Parse Dynamo's message of a graph break into its place and reason.

    The message has the form "Graph break in user code at FILE:LINE", "Graph Break Reason: ...", and
    further paragraphs.
    """
    first, _, rest = text.partition("\n")
    reason = (
        rest.partition("Hint:")[0]
        .partition("Developer debug context")[0]
        .partition("User code traceback")[0]
        .removeprefix("Graph Break Reason: ")
    )
    return Break(first.rpartition(" at ")[2], " ".join(reason.split()))


class Ops(TorchDispatchMode):
    """The collectives and host syncs of this thread and of the backward passes that it starts, in order.

    With an accelerator, a sync is a read from it. Without one, a sync is a read that would be one
    if the tensors were on a device. `plan_sizes` and `read_sizes` count as one sync each. Reads
    inside an op of moecomm do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[Sync] = []
        self.collectives: list[Collective] = []
        self.within = False  # whether an op of moecomm is running

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op._opname
        own = op.namespace == "moecomm"
        if op in (plan_sizes, read_sizes):
            self.read(name)
        elif not own and _reads(name, args, kwargs):
            self.read(name.removeprefix("_"))
        before, self.within = self.within, own
        try:
            result = op(*args, **kwargs)
        finally:
            self.within = before
        if op in STARTS or (op.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor"):
            self.collectives.append(Collective(name, _phase(), _received(op, args, result), _place()))
        return result

    def read(self, name: str) -> None:
        self.syncs.append(Sync(name, _phase(), _place()))


class Calls(TorchFunctionMode):
    """Counts the reads that call no op on a machine without an accelerator, in eager mode."""

    def __init__(self, ops: Ops) -> None:
        super().__init__()
        self.ops = ops

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READ_CALLS and not self.ops.within and not torch.accelerator.is_available():
            self.ops.read(name)
        return function(*args, **(kwargs or {}))


def _reads(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    on_device = any(not tensor.is_cpu for tensor in tensors)
    if torch.accelerator.is_available() and not on_device:
        return False
    if name == "_to_copy":
        return on_device and torch.device(kwargs.get("device") or tensors[0].device).type == "cpu" and not kwargs.get("non_blocking")
    if name == "copy_":
        return on_device and tensors[0].is_cpu and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
    if name in ("index", "index_put", "index_put_"):  # a mask becomes a list of indices, whose length the host must know
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if name == "repeat_interleave":
        return "output_size" not in kwargs
    return name in READ_OPS


def _received(op: Any, args: Any, result: Any) -> int:
    """The bytes that a collective writes into its arguments or, if it writes into none, the bytes that it returns."""
    written = [arg for arg, of in zip(args, op._schema.arguments, strict=False) if of.alias_info is not None and of.alias_info.is_write]
    return sum(leaf.nbytes for leaf in tree_leaves(written or result) if isinstance(leaf, Tensor))


def _phase() -> str:
    return "forward" if torch._C._current_graph_task_id() == -1 else "backward"


def _place() -> str:
    """The innermost line that is not in torch, moecomm or Python itself; in a backward pass, the line that started it."""
    for frame, line in traceback.walk_stack(None):
        file = frame.f_code.co_filename
        own = file.startswith(PYTHON) and "site-packages" not in file
        if os.path.isfile(file) and not own and not file.startswith(tuple(LIBRARIES)) and "torchinductor" not in file:
            return f"{file}:{line}"
    return ""


@contextmanager
def saving(given: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """The storages that are kept for the backward pass inside the block, by address, with their bytes.

    Storages of ``given`` and of leaves that require a gradient do not count.
    """
    kept: dict[int, int] = {}
    own = {part.untyped_storage().data_ptr() for tensor in given for part in _parts(tensor)}

    def pack(tensor: Tensor) -> Tensor:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            if tensor.is_leaf and tensor.requires_grad:
                own.add(storage.data_ptr())
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
    for pointer in own:
        kept.pop(pointer, None)


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], eager: bool) -> Run:
    """Run one forward pass of ``function`` and, if its result needs gradients, one backward pass.

    All ``.grad`` are restored afterwards.
    """
    parameters = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)] + parameters
    ops = Ops()
    with ExitStack() as watching:
        kept = watching.enter_context(saving(given))
        watching.enter_context(ops)
        if eager:
            watching.enter_context(Calls(ops))
        result = function(*args, **kwargs)
    roots = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    if roots:
        with _gradients_kept({*_leaves(roots), *parameters}), ops:
            torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
    return Run(ops.syncs, ops.collectives, sum(kept.values()))


def _leaves(roots: list[Tensor]) -> set[Tensor]:
    """The tensors to which a backward pass from ``roots`` adds gradients."""
    nodes, seen, leaves = [root.grad_fn for root in roots], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return leaves


@contextmanager
def _gradients_kept(leaves: Iterable[Tensor]) -> Iterator[None]:
    before = {leaf: leaf.grad for leaf in leaves}
    for leaf in before:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad in before.items():
            leaf.grad = grad
