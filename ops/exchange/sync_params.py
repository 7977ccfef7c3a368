"""sync_params: out[i] = rank src's params[i]. all_reduce: out = (flat of rank 0 + flat of rank 1 + ..., in rank order) / divisor.

sync_params costs one broadcast per dtype. all_reduce is an all-to-all, `rank_sum` and an all-gather. It sends each rank's bytes
2 * (P - 1) / P times, as a ring does.
The backward of sync_params is all_reduce of the gradients, one flat tensor per dtype. The backward of that is all_reduce again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moecomm.ops.base.library import LIBRARY, define
from moecomm.ops.base.process_group import process_group
from moecomm.ops.exchange.collectives import all_gathered, start_all_gather, start_all_to_all, wait
from moecomm.ops.exchange.slices import chunk_size
from moecomm.ops.exchange.start_op import define_start, register
from moecomm.ops.rows.rank_sum import rank_sum

START = "start_broadcast(Tensor[] tensors, int src, str group) -> Tensor"
SPLIT = "split_copy(Tensor flat, SymInt[] sizes) -> Tensor[]"
SYNC = "sync_params(Tensor[] params, int src, int? divisor, int ranks, str group) -> Tensor[]"


def start_broadcast_fake(tensors: Sequence[Tensor], src: int, group: str) -> Tensor:
    return tensors[0].new_empty(_length(tensors))


def start_broadcast_here(tensors: Sequence[Tensor], src: int, group: str) -> Tensor:
    """Start the broadcast of tensors of one dtype, concatenated, from rank ``src`` of the group; the caller waits for it."""
    ranks = process_group(group)
    here = ranks.rank() == src
    flat = flatten(tensors) if here else start_broadcast_fake(tensors, src, group)
    if flat.numel():
        message = flat.view(torch.uint8)  # gloo sends bytes, but not every dtype
        work = dist.broadcast(message, group=ranks, group_src=src, async_op=True)
        register(flat, work, f"the parameters of rank {src}", ranks)
    return flat


def split_copy_fake(flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [flat.new_empty(size) for size in sizes]


def split_copy_here(flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Copy each piece into its own memory: it is aligned for any kernel, and freed as soon as nothing needs it."""
    return list(torch.ops.aten.split_with_sizes_copy(flat, sizes))


start_broadcast = define_start(START, start_broadcast_fake, start_broadcast_here, start_broadcast_here)
split_copy = define(SPLIT, split_copy_fake, split_copy_here, split_copy_here)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one dtype, concatenated."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    """The indices of the tensors of each dtype."""
    buckets: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        buckets.setdefault(tensor.dtype, []).append(i)
    return list(buckets.values())


class Bucket(NamedTuple):
    """Tensors of one dtype that travel in one message, and the divisor of their sum over a group."""

    tensors: Sequence[Tensor]
    divisor: int
    ranks: int
    group: str


def all_reduce(buckets: Sequence[Sequence[Tensor]], divisor: int, ranks: int, group: str, before: bool = False) -> list[Tensor]:
    """For each bucket of tensors of one dtype: their sums over the ranks, divided by ``divisor``, concatenated."""
    return all_reduce_buckets([Bucket(bucket, divisor, ranks, group) for bucket in buckets], before)


def all_reduce_buckets(buckets: Sequence[Bucket], before: bool = False) -> list[Tensor]:
    """`all_reduce` for buckets of several groups. The groups come in the same order on all ranks.

    All all-to-alls start before the first wait. Each all-gather starts as soon as its sum is there.
    """
    flats = [_padded(bucket.tensors, bucket.ranks) for bucket in buckets]
    exchanged = [_start_exchange(flat, bucket.ranks, bucket.group) for flat, bucket in zip(flats, buckets, strict=True)]
    sums, gathered = [], []
    for flat, parts, bucket in zip(flats, exchanged, buckets, strict=True):
        mine = wait(parts).view(flat.dtype).view(bucket.ranks, -1)  # [P, chunk], part p from rank p
        sums.append(rank_sum(mine, bucket.divisor, before))  # [chunk]
        gathered.append(start_all_gather(sums[-1], bucket.ranks, bucket.group))
    arriving = zip(gathered, sums, buckets, strict=True)
    wholes = [all_gathered(pending, total, bucket.ranks) for pending, total, bucket in arriving]  # [P * chunk] each
    return [whole.narrow(0, 0, _length(bucket.tensors)) for whole, bucket in zip(wholes, buckets, strict=True)]


def _length(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _padded(tensors: Sequence[Tensor], ranks: int) -> Tensor:
    """The tensors and zeros, concatenated, so that each rank has a chunk of the same length and no chunk is empty."""
    length = _length(tensors)
    return flatten([*tensors, tensors[0].new_zeros(ranks * max(1, chunk_size(length, ranks)) - length)])


def _start_exchange(flat: Tensor, ranks: int, group: str) -> Tensor:
    """Start to send each rank its chunk, as bytes."""
    return start_all_to_all(flat.view(torch.uint8), [flat.numel() // ranks * flat.itemsize] * ranks, group)


class _SyncParams(torch.autograd.Function):
    @staticmethod
    def forward(src: int, divisor: int | None, ranks: int, group: str, *params: Tensor) -> tuple[Tensor, ...]:
        buckets = by_dtype(params)
        started = [start_broadcast([params[i] for i in bucket], src, group) for bucket in buckets]
        synced = list(params)
        for bucket, flat in zip(buckets, started, strict=True):
            _put(synced, bucket, wait(flat))
        return tuple(synced)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, *ctx.how = inputs[:4]
        ctx.needed = ctx.needs_input_grad[4:]
        # Otherwise one parameter that needs a gradient would give a gradient to all of them.
        ctx.mark_non_differentiable(*(param for param, needed in zip(output, ctx.needed, strict=True) if not needed))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        divisor, ranks, group = ctx.how
        needed = [grad for grad, needed in zip(grads, ctx.needed, strict=True) if needed]
        if divisor is not None:
            needed = _ReduceGrads.apply(divisor, ranks, group, *needed)
        rest = iter(needed)
        return None, None, None, None, *(next(rest) if needed else None for needed in ctx.needed)


class _ReduceGrads(torch.autograd.Function):
    @staticmethod
    def forward(divisor: int, ranks: int, group: str, *grads: Tensor) -> tuple[Tensor, ...]:
        buckets = by_dtype(grads)
        flats = all_reduce([[grads[i] for i in bucket] for bucket in buckets], divisor, ranks, group)
        reduced = list(grads)
        for bucket, flat in zip(buckets, flats, strict=True):
            _put(reduced, bucket, flat)
        return tuple(reduced)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.how = inputs[:3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_ReduceGrads.apply(*ctx.how, *grads)


def _put(tensors: list[Tensor], bucket: list[int], flat: Tensor) -> None:
    """Replace the tensors of a bucket by those in ``flat``."""
    for i, piece in zip(bucket, split_copy(flat, [tensors[i].numel() for i in bucket]), strict=True):
        tensors[i] = torch.ops.aten._unsafe_view(piece, tensors[i].shape)  # the piece has its own memory, so it may be written to


def _sync_params(params: Sequence[Tensor], *how: Any) -> list[Tensor]:
    return list(_SyncParams.apply(*how, *params))


LIBRARY.define(SYNC, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("sync_params", _sync_params, "CompositeImplicitAutograd")


def sync_params(params: Sequence[Tensor], src: int, divisor: int | None, ranks: int, group: str) -> list[Tensor]:
    """Return rank src's params, one new tensor each.

    While Dynamo traces, this calls the op, because Dynamo cannot look into the function that the op runs. Otherwise it calls that
    function: torch.func.grad reaches it, but not through an op.
    """
    function = torch.ops.moecomm.sync_params if torch.compiler.is_dynamo_compiling() else _sync_params
    return function(params, src, divisor, ranks, group)
