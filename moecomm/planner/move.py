"""move_experts_: weights and optimizer state go to the ranks where a new placement has their experts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moecomm.errors import check_sent, wrong_type, wrong_value
from moecomm.layer.placement import Placement, check_experts_of, checked_rows
from moecomm.ops.base.process_group import process_group
from moecomm.ops.base.signature import traced
from moecomm.ops.exchange.all_to_all import start
from moecomm.ops.exchange.collectives import wait
from moecomm.ops.routing.place_slots import check_rows, upload
from moecomm.parallel.agree import check_same_kind, check_same_placement, least, tell_refusal
from moecomm.parallel.group import Group, GroupLike, resolve_group
from moecomm.training.params import Params, check_device, in_buckets, local_part, named_tensors

PART = 8  # of the free memory: what one exchange may take is an eighth
MOST = 2**28  # and no more than this: larger messages are not faster

Rows = list[list[int]]


def move_experts_(
    params: Params, optimizer: torch.optim.Optimizer | None, old: Placement, new: Placement, group: GroupLike = None, *,
    chunk_bytes: int | None = None,
) -> None:  # fmt: skip
    """Move the experts' weights and their optimizer state from the placement ``old`` to ``new``, in place.

    Call it between an optimizer's step and the next forward pass, and pass ``new`` to `plan` from
    then on. The tensors stay the same objects with the same shapes: a compiled layer is not compiled
    again for them, nor is FSDP2 or the optimizer told.

    Args:
        params: the experts' weights, [L, ...] each, trained or frozen, of any dtypes that are sent,
            the same shapes and dtypes on all ranks. An ``nn.Module`` (all its parameters), a mapping
            from names to tensors, or tensors, such as master weights that are kept apart. Row l is
            local expert l of ``old``. The local shard of a DTensor moves: its dim 0 is the experts
            of this rank, other dims may be sharded over other ranks, as by FSDP2 with ``Shard(1)``.
        optimizer: the state that it has of ``params`` moves along, whatever the optimizer: every
            tensor [L, ...], such as Adam's moments. Tensors of one number, such as Adam's step, stay.
            None moves the weights alone.
        old: where the experts are, [P, L], as `plan` takes it. Replicas of an expert are equal, as
            `sync_replica_grads_` keeps them.
        new: where they go, [P, L], of the same experts and the same L.
        group: that of `plan`. A ProcessGroup, a 1-D DeviceMesh, (mesh, dim), a group's name, or
            None for the default group.
        chunk_bytes: the memory that one exchange may take on a rank. By default an eighth of the
            free memory of the rank that has least, at most 256 MiB. A row of a tensor that is not
            contiguous is never split.

    Raises:
        TypeError, ValueError: an argument is wrong on this rank; raised before anything is sent.
        MoECommError: the ranks differ in ``old`` or ``new``, or in the number, shape or dtype of
            weights, gradients or optimizer state. It is the same on every rank, and nothing moved. If
            one rank raises its own error and has a tensor on a device of the group, all other ranks
            raise a MoECommError, too.
        RuntimeError: a rank died, or another failure of the group. The experts may then have moved
            in part: go on from a checkpoint.

    Backward: none. This function is not part of any graph.

    >>> weight = torch.tensor([[0.0], [1.0]])
    >>> move_experts_(weight, None, old=[[0, 1]], new=[[1, 0]])
    >>> weight
    tensor([[1.],
            [0.]])

    Costs four small exchanges that the host reads, and one exchange for each dtype, or several where
    a chunk is full. An expert is sent only to ranks that lack it, by one of its holders: the one that
    sends least so far. A gradient that is not None moves as well.
    """
    ranks = resolve_group(group)
    tensors: list[Tensor] = []
    try:
        if traced():
            wrong_value("move_experts_", "called in traced code", "called between two steps, outside of any graph")
        tensors = list(named_tensors(params).values())
        before, after = checked_rows(old, ranks, "old"), checked_rows(new, ranks, "new")
        experts = max(map(max, before)) + 1
        check_rows(after, experts, "new")
        if len(before[0]) != len(after[0]):
            wrong_value("new", f"of {len(after[0])} experts on each rank", f"of as many as in old, {len(before[0])}, since shapes stay")
        if chunk_bytes is not None and (not isinstance(chunk_bytes, int) or chunk_bytes <= 0):
            wrong_value("chunk_bytes", repr(chunk_bytes), "a positive int")
        local = [local_part(tensor).detach() for tensor in _with_state(tensors, optimizer, len(before[0]))]
        check_experts_of(local, len(before[0]))
        check_device(local)
        for tensor in local:
            check_sent("params", tensor)
    except (TypeError, ValueError):
        tell_refusal("move_experts_", (tensors, params), ranks)
        raise
    if not local:
        return
    with torch.no_grad():
        device = local[0].device
        if ranks.size > 1:
            check_same_placement("move_experts_", before, device, ranks, "old")
            check_same_placement("move_experts_", after, device, ranks, "new")
            check_same_kind("move_experts_", local, ranks)
        most = least("move_experts_", min(_free(device) // PART, MOST) if chunk_bytes is None else chunk_bytes, device, ranks)
        own = moves(before, after, process_group(ranks.name).rank() if ranks.size > 1 else 0)
        pieces = [piece for tensor in local for piece in _pieces(tensor, most // 3)]  # sent, received, and kept: 3 of L rows at most
        for bucket in in_buckets(pieces, most // 3):
            _exchange([pieces[i] for i in bucket], own, ranks)


class Moves(NamedTuple):
    """What one rank sends, receives and keeps. Slots are local experts."""

    send: list[int]  # the old slots to send to rank 0, then to rank 1, ...
    out: list[int]  # [P]: how many of them go to each rank
    receive: list[int]  # the new slots of what comes from rank 0, then from rank 1, ...
    into: list[int]  # [P]
    kept: list[tuple[int, int]]  # the old and the new slot of experts that stay on the rank in another slot


def moves(before: Rows, after: Rows, rank: int) -> Moves:
    """The moves of ``rank``: each expert that a rank lacks comes from the holder that has sent least so far, the lowest of several."""
    sends = [0] * len(before)
    holders: dict[int, list[int]] = {}
    for p, row in enumerate(before):
        for expert in row:
            holders.setdefault(expert, []).append(p)
    pairs: dict[tuple[int, int], list[int]] = {}  # (from, to): experts
    for p, row in enumerate(after):
        for expert in row:
            if expert not in before[p]:
                source = min(holders[expert], key=lambda q: (sends[q], q))
                sends[source] += 1
                pairs.setdefault((source, p), []).append(expert)
    to = [pairs.get((rank, p), []) for p in range(len(before))]
    come = [pairs.get((p, rank), []) for p in range(len(before))]
    mine, then = before[rank], after[rank]
    return Moves(
        [mine.index(expert) for experts in to for expert in experts],
        [len(experts) for experts in to],
        [then.index(expert) for experts in come for expert in experts],
        [len(experts) for experts in come],
        [(mine.index(expert), slot) for slot, expert in enumerate(then) if expert in mine and mine.index(expert) != slot],
    )


def _with_state(tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer | None, slots: int) -> list[Tensor]:
    """The weights, their gradients, and the tensors that the optimizer has of them, in an order that all ranks share."""
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        wrong_type("optimizer", type(optimizer).__name__, "a torch.optim.Optimizer or None")
    moved = []
    for tensor in tensors:
        moved.append(tensor)
        if tensor.grad is not None:
            moved.append(tensor.grad)
        state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        for name in sorted(state, key=str):
            value = state[name]
            if not isinstance(value, Tensor) or (value.numel() == 1 and value.dim() == 0):
                continue  # of the whole parameter, such as Adam's step
            if local_part(value).shape[:1] != (slots,):
                wrong_value(f"optimizer's {name!r}", f"of shape {list(local_part(value).shape)}", f"[{slots}, ...], a part for each expert")
            moved.append(value)
    return moved


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _pieces(tensor: Tensor, most: int) -> list[Tensor]:
    """Views of the tensor, [L, w] of at most ``most`` bytes each; itself, if its rows are not contiguous."""
    if tensor.nbytes <= most or tensor.dim() == 1 or not tensor.is_contiguous():
        return [tensor]
    width = max(1, most // (tensor.shape[0] * tensor.element_size()))
    return list(tensor.view(tensor.shape[0], -1).split(width, 1))


def _exchange(tensors: list[Tensor], own: Moves, group: Group) -> None:
    """One exchange, of tensors [L, ...] of one dtype. What is sent and kept is copied before anything is overwritten."""
    device = tensors[0].device
    sent, received, old, new = (
        upload(torch.tensor(slots, dtype=torch.int64), device)
        for slots in (own.send, own.receive, [slot for slot, _ in own.kept], [slot for _, slot in own.kept])
    )
    kept = [tensor.index_select(0, old) for tensor in tensors] if own.kept else []
    if group.size > 1:
        widths = [tensor[0].numel() for tensor in tensors]
        send = torch.cat([tensor.index_select(0, sent).reshape(len(sent), width) for tensor, width in zip(tensors, widths, strict=True)], 1)
        came = wait(start(send, len(received), torch.tensor([own.out, own.into]), 0, group.name, "the experts that move to this rank"))
        for tensor, part in zip(tensors, came.split(widths, 1), strict=True):
            tensor.index_copy_(0, received, part.reshape(len(received), *tensor.shape[1:]))
    for tensor, part in zip(tensors, kept, strict=bool(kept)):
        tensor.index_copy_(0, new, part)
