"""Triton's interpreter with every access of every kernel checked, to the element: in bounds, and no program in another one's way.

A load, a store or an atomic may touch the elements of the tensors that the kernel was launched with and nothing else: not what lies between
the elements of a strided view, nor what lies behind it in the same memory. Programs of a launch run in any order and at once, so that what
one has stored no other may load or store, atomics apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2
HOST = {"plan_sizes", "placement_table"}  # what is the same on all devices


class OutOfBounds(AssertionError):
    """A kernel touched what is not its own."""


class _Elements:
    """The elements of one size, in bytes, that a launch may touch, and which program did."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.addresses = np.unique(np.concatenate([_addresses(tensor) for tensor in tensors]))
        self.reader = np.full(self.addresses.shape, NOBODY)
        self.writer = np.full(self.addresses.shape, NOBODY)

    def at(self, addresses: np.ndarray, what: str) -> np.ndarray:
        found = np.searchsorted(self.addresses, addresses).clip(max=self.addresses.size - 1)
        outside = self.addresses[found] != addresses
        if outside.any():
            away = addresses[outside][0].astype(np.int64) - self.addresses.astype(np.int64)
            away = away[np.abs(away).argmin()]
            raise OutOfBounds(f"{what} of {int(outside.sum())} elements that are none of its tensors', the first {away:+} bytes off")
        return found

    def load(self, addresses: np.ndarray, program: int) -> None:
        here = self.at(addresses, "a load")
        self._alone(self.writer[here], program, "loads what another program stores")
        self.reader[here] = np.where(np.isin(self.reader[here], (NOBODY, program)), program, SEVERAL)

    def store(self, addresses: np.ndarray, program: int) -> None:
        here = self.at(addresses, "a store")
        if np.unique(here).size < here.size:
            raise OutOfBounds("a store writes an element twice")
        self._alone(self.writer[here], program, "stores what another program stores")
        self._alone(self.reader[here], program, "stores what another program loads")
        self.writer[here] = program

    @staticmethod
    def _alone(others: np.ndarray, program: int, what: str) -> None:
        if not np.isin(others, (NOBODY, program)).all():
            raise OutOfBounds(f"a program {what}")


def _addresses(tensor: Tensor) -> np.ndarray:
    offsets = np.zeros((), dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    return (tensor.data_ptr() + offsets.ravel() * tensor.itemsize).astype(np.uint64)


class _Launch:
    def __init__(self, arguments: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.numel()]
        sizes = {tensor.itemsize for tensor in tensors}
        self.elements = {size: _Elements([tensor for tensor in tensors if tensor.itemsize == size]) for size in sizes}

    def touched(self, pointers: Any, mask: Any) -> tuple[_Elements, np.ndarray, int]:
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        addresses, active = np.broadcast_arrays(pointers.data, True if mask is None else mask.data)
        addresses = addresses[active.astype(bool)].ravel().astype(np.uint64)
        if addresses.size and size not in self.elements:
            raise OutOfBounds(f"an access of elements of {size} bytes, which none of its tensors has")
        x, y, z = interpreter.interpreter_builder.grid_idx
        return self.elements.get(size, _NONE), addresses, (x * 2**20 + y) * 2**20 + z


_NONE = _Elements([torch.empty(0)])


def _convert(argument: Any) -> Any:
    """Triton's own conversion gives an int between 2^31 and 2^32 4 bytes, of which a store of it then reads 8 (3.9)."""
    if isinstance(argument, int) and 2**31 <= argument < 2**32:
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.int64), tl.int64), tl.int64)
    return _triton_converts(argument)


_triton_converts = interpreter._implicit_cvt


@contextmanager
def within_bounds() -> Iterator[set[str]]:
    """Check every kernel that is launched meanwhile; the names of those are what is given."""
    builder, names = interpreter.InterpreterBuilder, set()
    run, load, store = interpreter.GridExecutor.__call__, builder.create_masked_load, builder.create_masked_store
    atomic, exchange = builder.create_atomic_rmw, builder.create_atomic_cas
    launches: list[_Launch] = []

    def launched(kernel: Any, *args: Any, **rest: Any) -> Any:
        names.add(kernel.fn.__name__)
        with _disable_current_modes():  # what the interpreter does is its own affair
            launches.append(_Launch((args, rest)))
            try:
                return run(kernel, *args, **rest)
            except interpreter.InterpreterError as error:
                if isinstance(error.__cause__, OutOfBounds):
                    raise OutOfBounds(f"{kernel.fn.__name__}: {error.__cause__}") from error
                raise
            finally:
                launches.pop()

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        elements, addresses, program = launches[-1].touched(pointers, mask)
        if addresses.size:
            elements.load(addresses, program)
        return load(self, pointers, mask, *rest)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        elements, addresses, program = launches[-1].touched(pointers, mask)
        if addresses.size:
            elements.store(addresses, program)
        return store(self, pointers, value, mask, *rest)

    def added(self: Any, how: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        elements, addresses, _ = launches[-1].touched(pointers, mask)
        if addresses.size:
            elements.at(addresses, "an atomic")
        return atomic(self, how, pointers, value, mask, *rest)

    def exchanged(self: Any, pointers: Any, *rest: Any) -> Any:
        elements, addresses, _ = launches[-1].touched(pointers, None)
        elements.at(addresses, "an atomic")
        return exchange(self, pointers, *rest)

    with (
        patch.object(interpreter.GridExecutor, "__call__", launched),
        patch.object(interpreter, "_implicit_cvt", _convert),
        patch.multiple(
            builder, create_masked_load=loaded, create_masked_store=stored, create_atomic_rmw=added, create_atomic_cas=exchanged
        ),
    ):
        yield names


class Kernels(TorchDispatchMode):
    """The Triton implementations of moecomm's ops, on tensors of the CPU, in the place of those for the CPU."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "moecomm" and op.overloadpacket.__name__ not in HOST and op.has_kernel_for_dispatch_key(DispatchKey.CUDA):
            return op.redispatch(DispatchKeySet(DispatchKey.CUDA), *args, **(kwargs or {}))
        return op(*args, **(kwargs or {}))


def by_kernels(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` with the Triton implementations of moecomm's ops, in which every access is checked."""
    with within_bounds(), Kernels():
        return function(*args)
