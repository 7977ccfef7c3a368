"""clip_grad_norm_: scale all gradients down to one norm, over parameters on any meshes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moecomm.errors import wrong_type, wrong_value
from moecomm.layer.placement import Placement, check_experts_of, checked_rows
from moecomm.ops.base.process_group import process_group
from moecomm.ops.exchange.collectives import all_gathered, start_all_gather
from moecomm.ops.exchange.replicas import replica_shares
from moecomm.ops.exchange.sync_params import by_dtype
from moecomm.ops.rows.norms import norms
from moecomm.ops.rows.rank_sum import rank_sum
from moecomm.parallel.group import Group, GroupLike, resolve_group
from moecomm.training.params import Params, check_device, chosen_groups, first_matches, local_part, named_groups, named_tensors

EPSILON = 1e-6  # the same as in torch.nn.utils.clip_grad_norm_


def clip_grad_norm_(
    params: Params,
    max_norm: float,
    spread: Mapping[str | Tensor, GroupLike | list[GroupLike]] | None = None,
    replicas: Mapping[str | Tensor, tuple[Placement, GroupLike]] | None = None,
) -> Tensor:
    """Scale all gradients in place so that their norm, over all parameters and all ranks, is at most ``max_norm``. Return the norm.

    Each element of each parameter counts once, however many ranks have it. A DTensor tells itself
    over which dims of its mesh it is sharded, whatever the mesh. For other tensors ``spread`` tells
    it.

    Args:
        params: an ``nn.Module``, a mapping from names to tensors, or tensors, on one device; of the
            same names on all ranks. A parameter that occurs twice counts once. A parameter without
            a gradient does not count.
        max_norm: at least 0. ``float("inf")`` changes nothing: use it to get the norm alone.
        spread: the group, or list of groups, over which the ranks have different parts of a
            parameter, in addition to the mesh dims on which it is sharded. A mapping from patterns
            of names (as in `fnmatch`), or from parameters; the first match counts. Example:
            ``{"*.experts.*": mesh["ep"], "*": ""}``, where "" is the group of each process alone,
            so that no other rank has any part. With pipeline stages:
            ``{"*.experts.*": [mesh["ep"], mesh["pp"]], "*": mesh["pp"]}``. None: a tensor that is
            not a DTensor is the same on all ranks.
        replicas: for experts that are on several ranks: a mapping from patterns or parameters, as
            in ``spread``, to the placement and group that `sync_replica_grads_` took:
            ``{"*.experts.*": (placement, mesh["ep"])}``. The parameters are the experts' weights,
            [L, ...] each. Each of the c replicas of an expert counts for 1 / c, so that together
            they count once. None, or no match: no replicas. Under torch.compile the placement is
            lists of ints, as no graph can hold the values of a tensor.

    Returns:
        The norm before scaling: the Euclidean norm over all elements, float64, without dims, on the
        gradients' device, the same on all ranks. Gradients are multiplied by
        ``min(1, max_norm / (norm + 1e-6))``, as in torch. If any gradient holds an infinity or a
        NaN, the norm is not finite, and all gradients stay as they are: look at ``norm.isfinite()``
        before the optimizer's step. torch would make all of them 0 or NaN.

    Raises, before anything is sent:
        TypeError: ``params`` holds something that is not a tensor, a gradient is sparse, or
            ``max_norm`` is not a number.
        ValueError, in these cases:
            - ``max_norm`` is below 0
            - the tensors are on several devices
            - a gradient is a DTensor with a Partial placement
            - a parameter has no match in ``spread``
            - a key of ``spread`` or ``replicas`` is no parameter's first match
            - a placement in ``replicas`` does not fit its group or its parameters' L

    Backward: none. This function is not part of any graph.

    >>> weight = torch.zeros(2, requires_grad=True)
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0)
    tensor(5., dtype=torch.float64)
    >>> weight.grad
    tensor([0.6000, 0.8000])

    Costs one all-gather for each group over which parameters are spread, of one number per kind of
    parameter. A kind is the parameters that are spread over the same groups. There is no host
    synchronization.

    The norm of each gradient is computed in float32 (float64 for float64), and in float64 where its
    square is beyond float32. Sums of squares are in float64, and over the ranks in rank order: the
    same bits, run after run. Finite float32 gradients always have a finite norm. The factor is
    rounded to float32, which has fewer bits below 1e-38.
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
    kinds: dict[frozenset[Group], list[tuple[Tensor, Tensor | None]]] = {}  # per set of groups: the gradients that are spread over it
    for param, sharded, more, share in zip(tensors, own, beside, shares, strict=True):
        kind = frozenset(order[_ranks(group)] for group in (*sharded, *more) if group.size > 1)
        grads = kinds.setdefault(kind, [])
        if param.grad is not None:
            grads.append((local_part(param.grad), share))
    with torch.no_grad():
        zero = torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else None)
        squares = {kind: _sum_of_squares(grads, zero) for kind, grads in kinds.items()}
        norm = _total(squares, list(order.values()), zero).sqrt()
        if max_norm != math.inf:
            factor = (max_norm / (norm + EPSILON)).clamp(max=1).where(norm.isfinite(), 1)
            _scale_([grad for grads in kinds.values() for grad, _ in grads], factor)
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
    """Each group once, under its ranks, at its last place in ``groups``: the groups that the caller named come after those of DTensors.

    Pipeline stages may have different kinds of parameters. With this order they send each other one
    number for all kinds together. The key is the ranks, because a mesh that is made twice has two
    groups of the same ranks.
    """
    return dict(reversed(list({_ranks(group): group for group in reversed(groups) if group.size > 1}.items())))


def _ranks(group: Group) -> tuple[int, ...]:
    return _ranks_by_name(group.name)


@torch.compiler.assume_constant_result
def _ranks_by_name(name: str) -> tuple[int, ...]:
    """The ranks of the group of this name, traced as a constant: Dynamo cannot look into the registry of names."""
    return tuple(dist.get_process_group_ranks(process_group(name)))


def _shares(named: Mapping[str, Tensor], replicas: Mapping[str | Tensor, tuple[Placement, GroupLike]]) -> list[Tensor | None]:
    """For each parameter, how much each of its local experts counts: [L], 1 / c for an expert with c replicas.

    None if each expert of the parameter counts whole.
    """
    placed = []
    for choice in replicas.values():
        if not isinstance(choice, tuple) or len(choice) != 2:
            wrong_type("replicas", f"a mapping to {type(choice).__name__}", "a mapping to (placement, group)")
        ranks = resolve_group(choice[1])
        placed.append((checked_rows(choice[0], ranks), ranks))
    shares: list[Tensor | None] = []
    for param, first in zip(named.values(), first_matches("replicas", named, list(replicas)), strict=True):
        if first is None:
            shares.append(None)
            continue
        rows, ranks = placed[first]
        local = local_part(param)
        check_experts_of([local], len(rows[0]))
        shares.append(replica_shares(local.detach(), [expert for row in rows for expert in row], ranks.size, ranks.name))
    return shares


def _sum_of_squares(grads: list[tuple[Tensor, Tensor | None]], zero: Tensor) -> Tensor:
    """The sum of squares over this rank's elements, in float64."""
    total = zero
    for grad, share in grads:
        if share is not None and share.shape[0]:
            total = total + (norms(grad.unbind(0)).square() * share).sum()
    whole = [grad for grad, share in grads if share is None]
    for indices in by_dtype(whole):
        total = total + norms([whole[i] for i in indices]).square().sum()
    return total


def _total(squares: dict[frozenset[Group], Tensor], order: list[Group], zero: Tensor) -> Tensor:
    """The sum over all kinds and, for each kind, over the ranks of all its groups, one group after another."""
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
