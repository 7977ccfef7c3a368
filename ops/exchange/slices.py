"""slice_scatter: piece = x's chunk of this rank along dim. slice_gather: whole[chunk of rank p] = piece of rank p, for all p.

slice_reduce: piece[i] = sum over ranks p of p's whole[i], in rank order, in float32 for lower precisions. Chunks are those of
torch.chunk, and so of DTensor's Shard: ceil(size / P) long, and shorter or empty on the last ranks.
slice_scatter copies size / P and sends nothing. slice_gather sends the piece to all ranks.
slice_scatter and slice_gather are each other's backward. With reduce, slice_gather's mirror is slice_reduce.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moecomm.errors import wrong_value
from moecomm.ops.base.library import LIBRARY, define, direct_function
from moecomm.ops.base.process_group import process_group
from moecomm.ops.exchange.collectives import all_gathered, start_all_gather, start_all_to_all, wait
from moecomm.ops.rows.rank_sum import rank_sum


def chunk_size(size: int, ranks: int) -> int:
    """The length of all chunks except the last ones: ceil(size / ranks)."""
    return -(-size // ranks)


def chunk_bounds(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """The start of ``rank``'s chunk, and its length."""
    chunk = chunk_size(size, ranks)
    start = min(rank * chunk, size)
    return start, min(chunk, size - start)


# An op looks up the rank when it runs, so that a graph holds neither the rank nor a size that follows from it.


def take_slice_fake(x: Tensor, dim: int, length: int | None, ranks: int, group: str) -> Tensor:
    size = x.shape[dim]
    own: int | torch.SymInt
    if length is not None:
        own = length
    elif statically_known_true(size % ranks == 0):
        own = size // ranks
    else:
        own = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(*x.shape[:dim], own, *x.shape[dim + 1 :])


def take_slice_here(x: Tensor, dim: int, length: int | None, ranks: int, group: str) -> Tensor:
    start, own = chunk_bounds(x.shape[dim], ranks, process_group(group).rank())
    return x.narrow(dim, start, own).clone(memory_format=torch.contiguous_format)


take_slice = define(
    "take_slice(Tensor x, int dim, SymInt? length, int ranks, str group) -> Tensor", take_slice_fake, take_slice_here, take_slice_here
)


def pad_rows_fake(rows: Tensor, size: int) -> Tensor:
    return rows.new_empty(size, *rows.shape[1:])


def pad_rows_here(rows: Tensor, size: int) -> Tensor:
    padded = rows.new_empty(size, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    padded[rows.shape[0] :].view(torch.uint8).zero_()  # as bytes, because not every dtype can be filled
    return padded


# This is an op because the padding may have 0 rows or 1 row: without an op, the compiler would make a graph for each of the two.
pad_rows = define("pad_rows(Tensor rows, SymInt size) -> Tensor", pad_rows_fake, pad_rows_here, pad_rows_here)


def pad_slice_fake(piece: Tensor, size: int, ranks: int, group: str) -> Tensor:
    return piece.new_empty(chunk_size(size, ranks), *piece.shape[1:])


def pad_slice_here(piece: Tensor, size: int, ranks: int, group: str) -> Tensor:
    rank = process_group(group).rank()
    _, own = chunk_bounds(size, ranks, rank)
    if piece.shape[0] != own:
        wrong_value("x", f"{piece.shape[0]} long in dim", f"{own} long, the slice of rank {rank} of {ranks} where size is {size}")
    return pad_rows_here(piece, chunk_size(size, ranks))


pad_slice = define("pad_slice(Tensor piece, SymInt size, int ranks, str group) -> Tensor", pad_slice_fake, pad_slice_here, pad_slice_here)


def start_reduce(whole: Tensor, ranks: int, group: str) -> Tensor:
    """Start to send each rank its chunk of ``whole`` [size, ...]; `reduced` finishes it."""
    chunk = chunk_size(whole.shape[0], ranks)
    padded = pad_rows(whole, ranks * chunk)  # [ranks * chunk, ...], the same size on all ranks, so that a graph may hold it
    return start_all_to_all(padded, [chunk] * ranks, group)


def reduced(pending: Tensor, ranks: int) -> Tensor:
    """Wait for the parts that `start_reduce` sent, and return their sum: [chunk, ...]."""
    parts = wait(pending)  # [ranks * chunk, ...]
    chunk = parts.shape[0] // ranks
    return rank_sum(parts.view(ranks, -1), 1, False).view(chunk, *parts.shape[1:])


def cut_rows_fake(rows: Tensor, size: int, ranks: int, group: str) -> Tensor:
    return rows.new_empty(torch.library.get_ctx().new_dynamic_size(), *rows.shape[1:])


def cut_rows_here(rows: Tensor, size: int, ranks: int, group: str) -> Tensor:
    _, own = chunk_bounds(size, ranks, process_group(group).rank())
    return rows[:own].clone()


cut_rows = define("cut_rows(Tensor rows, SymInt size, int ranks, str group) -> Tensor", cut_rows_fake, cut_rows_here, cut_rows_here)


def _own(chunk: Tensor, size: int, length: int | None, ranks: int, group: str) -> Tensor:
    """This rank's chunk without its padding. ``length`` is the length without padding, or None if it is not known."""
    if length is not None:
        return chunk.narrow(0, 0, length)
    return chunk if statically_known_true(size % ranks == 0) else cut_rows(chunk, size, ranks, group)


def changeable(result: Tensor) -> Tensor:
    """``result`` of an autograd.Function, so that the caller may change it in place: the same memory, which is no view to autograd.

    Autograd refuses to change a view that a Function returned. `detach` returns no view, but shares the version counter: a tensor
    that was saved for a backward and then changed is still an error.
    """
    return result.detach()


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, length: int | None, ranks: int, group: str) -> Tensor:
        ctx.back = dim, x.shape[dim], ranks, group, False
        return take_slice(x, dim, length, ranks, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.moecomm.slice_gather(grad, *ctx.back), None, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, ranks: int, group: str, reduce: bool) -> Tensor:
        ctx.back = dim, x.shape[dim], ranks, group
        ctx.reduce = reduce
        chunk = pad_slice(x.movedim(dim, 0), size, ranks, group)
        whole = all_gathered(start_all_gather(chunk, ranks, group), chunk, ranks)
        # Only the last chunks are short, so all padding comes after the last row.
        return changeable(whole.narrow(0, 0, size).movedim(0, dim).contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mirror = torch.ops.moecomm.slice_reduce if ctx.reduce else torch.ops.moecomm.slice_scatter
        return mirror(grad, *ctx.back), None, None, None, None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, length: int | None, ranks: int, group: str) -> Tensor:
        ctx.back = dim, x.shape[dim], ranks, group, False
        total = reduced(start_reduce(x.movedim(dim, 0), ranks, group), ranks)
        return changeable(_own(total, x.shape[dim], length, ranks, group).movedim(0, dim).contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.moecomm.slice_gather(grad, *ctx.back), None, None, None, None


def define_function(schema: str, function: type[torch.autograd.Function]) -> Any:
    """Define an op that runs an autograd.Function. The compiler traces into it, forward and backward; Dynamo need not."""
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, lambda *args: function.apply(*args), "CompositeImplicitAutograd")
    return direct_function(getattr(torch.ops.moecomm, name).default, function)


slice_scatter = define_function("slice_scatter(Tensor x, int dim, SymInt? length, int ranks, str group) -> Tensor", _Scatter)
slice_gather = define_function("slice_gather(Tensor x, int dim, SymInt size, int ranks, str group, bool reduce) -> Tensor", _Gather)
slice_reduce = define_function("slice_reduce(Tensor x, int dim, SymInt? length, int ranks, str group) -> Tensor", _Reduce)
