"""clip_grad_norm_: one gradient norm over parameters on any meshes, and gradients scaled down to it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moecomm.errors import wrong_type, wrong_value
from moecomm.layer.placement import Placement, check_experts_of, checked_rows
from moecomm.ops.base.process_group import process_group
from moecomm.ops.exchange.collectives import all_gathered, start_all_gather
from moecomm.ops.exchange.sync_params import by_dtype
from moecomm.ops.routing.place_slots import upload
from moecomm.ops.rows.rank_sum import rank_sum
from moecomm.parallel.group import Group, GroupLike, resolve_group
from moecomm.training.params import Params, check_device, chosen_groups, first_matches, local_part, named_groups, named_tensors

EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


def clip_grad_norm_(
    params: Params,
    max_norm: float,
    spread: Mapping[str | Tensor, GroupLike | list[GroupLike]] | None = None,
    replicas: Mapping[str | Tensor, tuple[Placement, GroupLike]] | None = None,
) -> Tensor:
    """Scale all gradients, in place, so that the norm of all of them together, over all ranks, is at most ``max_norm``.

    Each element of each parameter counts once, wherever it is, and however many ranks have it: a DTensor says itself over which dims of
    its mesh it is sharded, whatever the mesh; ``spread`` says it of tensors that are none.

    Args:
        params: an ``nn.Module``, a mapping from names to tensors, or tensors, on one device; of the same names on all ranks. One that
            is there twice, or has no gradient, counts once, or not at all.
        max_norm: at least 0; ``float("inf")`` scales nothing, where the norm alone is of interest.
        spread: over which group, or list of groups, the ranks have different parts of a parameter, beside the dims of its mesh on which
            it is sharded: a mapping from patterns of names (as in `fnmatch`), or from parameters, of which the first match counts.
            ``{"*.experts.*": mesh["ep"], "*": ""}``: "" is the group of each process alone, and so no other rank has any part. With
            stages of a pipeline: ``{"*.experts.*": [mesh["ep"], mesh["pp"]], "*": mesh["pp"]}``. None: a tensor that is no DTensor is
            the same on all ranks.
        replicas: of the experts' weights, [L, ...] each, where some experts are on several ranks: a mapping from such patterns or
            parameters to what `sync_replica_grads_` took, the placement and its group: ``{"*.experts.*": (placement, mesh["ep"])}``. Of
            an expert with c replicas each counts for 1 / c, so that they count once together. None, or no match: there are none.

    Returns the norm before scaling, the Euclidean one over all elements: float64, of no dims, on the gradients' device, and the same on
    all ranks. Gradients are scaled by ``min(1, max_norm / (norm + 1e-6))``, as torch does.

    Costs an all-gather of one number a kind of parameter for each group that is named: kinds are parameters spread over the same groups.
    The host reads nothing. Norms of single gradients are made in float32 (float64 for float64), sums of squares in float64, over the
    ranks in their order: the same bits, run after run.

    Backward: none; it is no part of any graph.

    Raises TypeError where ``params`` holds anything but tensors, a gradient is sparse or ``max_norm`` no number; ValueError where
    ``max_norm`` is below 0, the tensors are on several devices, a gradient is a DTensor with a Partial placement, in ``spread`` a
    parameter has no match, in ``spread`` or ``replicas`` a key is no parameter's first match, or a placement in ``replicas`` is none of
    its group's, or not of its parameters' L; before anything is sent.

    >>> weight = torch.zeros(2, requires_grad=True)
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0)
    tensor(5., dtype=torch.float64)
    >>> weight.grad
    tensor([0.6000, 0.8000])
    """
    if not isinstance(max_norm, int | float):
        wrong_type("max_norm", type(max_norm).__name__, "a number")
    if not max_norm >= 0:
        wrong_value("max_norm", max_norm, "at least 0")
    named = named_tensors(params)
    tensors = list(named.values())
    check_device(tensors)
    beside = chosen_groups("spread", named, spread, several=True) if spread is not None else [[] for _ in tensors]
    own = [_sharded_over(name, param) for name, param in named.items()]
    shares = _shares(named, replicas or {})
    callers = named_groups(spread or {}, several=True)
    order = _order([group for groups in (*own, *callers) for group in groups])
    kinds: dict[frozenset[Group], list[tuple[Tensor, Tensor | None]]] = {}  # of the parameters that are spread over the same groups
    for param, sharded, more, share in zip(tensors, own, beside, shares, strict=True):
        kind = frozenset(order[_ranks(group)] for group in (*sharded, *more) if group.size > 1)
        grads = kinds.setdefault(kind, [])
        if param.grad is not None:
            grads.append((local_part(param.grad), share))
    with torch.no_grad():
        zero = torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else None)
        squares = {kind: _sum_of_squares(grads, zero) for kind, grads in kinds.items()}
        norm = _total(squares, list(order.values()), zero).sqrt()
        _scale_([grad for grads in kinds.values() for grad, _ in grads], (max_norm / (norm + EPSILON)).clamp(max=1))
    return norm


def _sharded_over(name: str, param: Tensor) -> list[Group]:
    """The groups of the mesh dims on which the parameter's gradient is sharded."""
    tensor = param if param.grad is None else param.grad
    if tensor.layout != torch.strided:
        wrong_type("params", f"{name!r} with a gradient of layout {tensor.layout}", "tensors with dense gradients")
    if not isinstance(tensor, DTensor):
        return []
    if any(placement.is_partial() for placement in tensor.placements):
        wrong_value("params", f"{name!r} with a gradient of placements {tensor.placements}", "a gradient that is added up, without Partial")
    return [resolve_group((tensor.device_mesh, i)) for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]


def _order(groups: list[Group]) -> dict[tuple[int, ...], Group]:
    """The groups by their ranks, each once, where it is named last: those that the caller named are behind those of DTensors.

    So stages of a pipeline, which may have different kinds of parameters, send each other one number for all of them together. By their
    ranks, since a mesh that is made twice has two groups of the same ranks.
    """
    return dict(reversed(list({_ranks(group): group for group in reversed(groups) if group.size > 1}.items())))


def _ranks(group: Group) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(process_group(group.name)))


def _shares(named: Mapping[str, Tensor], replicas: Mapping[str | Tensor, tuple[Placement, GroupLike]]) -> list[Tensor | None]:
    """For each parameter how much each of its local experts counts, [L], 1 / c where it has c replicas; None where each counts whole."""
    placed = []
    for choice in replicas.values():
        if not isinstance(choice, tuple) or len(choice) != 2:
            wrong_type("replicas", f"a mapping to {type(choice).__name__}", "a mapping to (placement, group)")
        ranks = resolve_group(choice[1])
        rows = checked_rows(choice[0], ranks)
        mine = rows[process_group(ranks.name).rank() if ranks.size > 1 else 0]
        placed.append([1 / sum(expert in row for row in rows) for expert in mine])
    shares: list[Tensor | None] = []
    for param, first in zip(named.values(), first_matches("replicas", named, list(replicas)), strict=True):
        if first is None:
            shares.append(None)
            continue
        check_experts_of([local_part(param)], len(placed[first]))
        shares.append(upload(torch.tensor(placed[first], dtype=torch.float64), param.device))
    return shares


def _sum_of_squares(grads: list[tuple[Tensor, Tensor | None]], zero: Tensor) -> Tensor:
    """Over the elements that are here, float64: the squares of float32 norms can pass what float32 holds."""
    total = zero
    for grad, share in grads:
        if share is not None:
            norms = torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=torch.promote_types(grad.dtype, torch.float32))  # [L]
            total = total + (norms.double().square() * share).sum()
    whole = [grad for grad, share in grads if share is None]
    for indices in by_dtype(whole):
        own = [whole[i] for i in indices]
        norms = torch._foreach_norm(own, 2, dtype=torch.promote_types(own[0].dtype, torch.float32))
        total = total + torch.stack(norms).double().square().sum()
    return total


def _total(squares: dict[frozenset[Group], Tensor], order: list[Group], zero: Tensor) -> Tensor:
    """The sum over all kinds and, for each, over the ranks of all of its groups: one group after another."""
    for group in order:
        over = [kind for kind in squares if group in kind]
        if not over:
            continue
        mine = torch.stack([squares.pop(kind) for kind in over])  # [kinds]
        all_ranks = all_gathered(start_all_gather(mine, group.size, group.name), mine, group.size)  # [P * kinds]
        for kind, square in zip(over, rank_sum(all_ranks.view(group.size, -1), 1, False), strict=True):
            squares[kind - {group}] = squares.get(kind - {group}, zero) + square
    return squares.get(frozenset(), zero)


def _scale_(grads: list[Tensor], factor: Tensor) -> None:
    for indices in by_dtype(grads):
        own = [grads[i] for i in indices]
        torch._foreach_mul_(own, factor.to(torch.promote_types(own[0].dtype, torch.float32)))
