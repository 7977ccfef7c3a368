"""What a call sends to other ranks and reads from the device: every collective with its bytes, every host read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# What makes the host wait for the device where the tensor is not on the CPU, as a call or as an op.
READS = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "is_nonzero"}
READ_OPS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal", "bincount"}
SENDS = (
    "all_to_all_single", "all_to_all", "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor",
    "broadcast", "gather", "scatter", "reduce", "send", "recv", "isend", "irecv", "batch_isend_irecv", "barrier", "all_gather_object",
)  # fmt: skip


class Traffic:
    """``with Traffic() as traffic``: what happened meanwhile, in this thread, in the order in which it happened.

    An op of moecomm is looked into for what it sends, and counts as one host read where it is the one whose job that is; what its CPU
    implementation does with tensors that are on the CPU is no read from a device.
    """

    def __init__(self) -> None:
        self.collectives: list[str] = []
        self.bytes: list[list[int]] = []  # of each all-to-all, to each rank
        self.reads: list[str] = []
        self._within = False  # an op of moecomm
        self._exit = ExitStack()

    def __enter__(self) -> Traffic:
        for name in SENDS:
            self._exit.enter_context(patch.object(dist, name, self._counted(name, getattr(dist, name))))
        self._exit.enter_context(_Calls(self))
        self._exit.enter_context(_Ops(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exit.close()

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            self.collectives.append(name)
            if name == "all_to_all_single":
                output, send, into, out = args
                ranks = dist.get_world_size(keywords["group"])
                self._sent(send, [send.shape[0] // ranks] * ranks if out is None else out)
            return function(*args, **keywords)

        return call

    def _sent(self, send: Tensor, splits: list[int]) -> None:
        row = send.nbytes // sum(splits) if sum(splits) else 0
        self.bytes.append([row * length for length in splits])


class _Ops(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = op.namespace, op.overloadpacket.__name__
        if namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            self.traffic.collectives.append(name)
            if name == "all_to_all_single":
                self.traffic._sent(args[0], args[2])
        if name == "gather_exchange":  # torch's all-gather, started by the group itself
            self.traffic.collectives.append("all_gather_into_tensor")
        to = (kwargs or {}).get("device")
        if name in READ_OPS or name == "plan_sizes" or (name == "_to_copy" and str(to) == "cpu" and not args[0].is_cpu):
            self.traffic.reads.append(name)
        within, self.traffic._within = self.traffic._within, namespace == "moecomm"
        try:
            return op(*args, **(kwargs or {}))
        finally:
            self.traffic._within = within


class _Calls(TorchFunctionMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS and not self.traffic._within:
            self.traffic.reads.append(name)
        return function(*args, **(kwargs or {}))
