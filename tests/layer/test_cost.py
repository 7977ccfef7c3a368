"""What a layer costs: its collectives, the bytes that they send, what the host reads, and what is kept for the backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import moecomm.functional as mf
from moecomm.ops.base.signature import LENGTH
from tests import reference
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

D, TOKENS, NUM_EXPERTS = 12, (7, 3, 0, 5), 8
MANY = (9000, 3, 0, 5)  # tokens, of which one rank has too many for the slots to travel with the counts


class Cost(NamedTuple):
    collectives: list[str]
    bytes: list[list[int]]
    reads: list[str]


def routing(k: int, tokens: tuple[int, ...] = TOKENS) -> tuple[Tensor, Tensor]:
    """The experts and weights of all ranks' tokens, some dropped: [T, K]."""
    seed = torch.Generator().manual_seed(k)
    experts = torch.randint(-1, NUM_EXPERTS, (sum(tokens), k), generator=seed)
    return experts, torch.rand(experts.shape, generator=seed)


def cost_here(k: int, dtype: torch.dtype, tokens: tuple[int, ...] = TOKENS) -> tuple[Cost, Cost]:
    """What this rank's layer costs forward, and backward."""
    rank = dist.get_rank()
    own = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    experts, weights = (part[own] for part in routing(k, tokens))
    weights.requires_grad_()
    x = torch.ones(tokens[rank], D, dtype=dtype, requires_grad=True)
    with Traffic() as forward:
        plan = mf.plan(experts, weights, NUM_EXPERTS, like=x)
        y = mf.combine(mf.dispatch(x, plan) * 2, plan)
    with Traffic() as backward:
        torch.autograd.grad(y, (x, weights), torch.ones_like(y))
    return Cost(forward.collectives, forward.bytes, forward.reads), Cost(backward.collectives, backward.bytes, backward.reads)


READS = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x.sum().item(),
    "__int__": lambda x: int(x.sum()),
    "cpu": lambda x: x.cpu(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("name", READS)
def test_traffic_sees_a_read(name: str) -> None:
    with Traffic() as traffic:
        READS[name](torch.arange(3))
    assert name in traffic.reads


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_a_layer_reads_from_the_device_once_forward_and_never_backward(ranks: int) -> None:
    for forward, backward in run_ranks(cost_here, ranks, 2, torch.float32):
        assert forward.reads == ["plan_sizes"]
        assert backward.reads == []


@pytest.mark.parametrize(("tokens", "exchanges"), [(TOKENS, 3), (MANY, 4)])
@pytest.mark.parametrize("ranks", [2, FOUR])
def test_a_layer_is_three_exchanges_forward_or_four_and_three_backward(ranks: int, tokens: tuple[int, ...], exchanges: int) -> None:
    for forward, backward in run_ranks(cost_here, ranks, 2, torch.float32, tokens):
        assert forward.collectives == ["all_to_all_single"] * exchanges  # counts, ids and weights where they are many, tokens, sums
        assert backward.collectives == ["all_to_all_single"] * 3  # the gradients of sums, tokens and weights


def test_a_group_of_one_sends_nothing() -> None:
    [(forward, backward)] = run_ranks(cost_here, 1, 2, torch.float32)
    assert forward.collectives == backward.collectives == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("ranks", [2, FOUR])
@pytest.mark.parametrize("tokens", [TOKENS, MANY], ids=["few", "many"])
def test_a_token_travels_once_to_a_rank_and_one_sum_comes_back(tokens: tuple[int, ...], ranks: int, k: int, dtype: torch.dtype) -> None:
    experts, _ = routing(k, tokens)
    local = NUM_EXPERTS // ranks
    of_rank = experts[: sum(tokens[:ranks])].split(tokens[:ranks])
    pairs = torch.tensor([[reference.pairs(of, p * local, (p + 1) * local) for p in range(ranks)] for of in of_rank])  # [from, to]
    token, slots, weights = D * dtype.itemsize, k * (1 + 4), k * 4  # bytes: an id takes one, a float32 weight four
    for rank, (forward, backward) in enumerate(run_ranks(cost_here, ranks, k, dtype, tokens)):
        out, back = pairs[rank], pairs[:, rank]
        header = 8 * LENGTH  # int64: pairs, slots, lowest and highest id, what ranks must agree on, and few slots, or zeros
        assert forward.bytes[0] == [header] * ranks
        assert sorted(forward.bytes[1:-1]) == sorted([(out * slots).tolist()] * (tokens is MANY) + [(out * token).tolist()])
        assert forward.bytes[-1] == (back * token).tolist()
        assert backward.bytes[0] == (out * token).tolist()
        assert sorted(backward.bytes[1:]) == sorted([(back * token).tolist(), (back * weights).tolist()])


class Saved(NamedTuple):
    """What a step keeps for the backward pass: shapes and dtypes, and whether it is a tensor that the caller has anyway."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    callers: bool


def saved_here() -> tuple[dict[str, list[Saved]], dict[str, Any]]:
    rank = dist.get_rank()
    own = slice(sum(TOKENS[:rank]), sum(TOKENS[: rank + 1]))
    experts, weights = (part[own] for part in routing(3))
    weights.requires_grad_()
    x = torch.ones(TOKENS[rank], D, requires_grad=True)
    callers = [x, weights, experts]
    saved: dict[str, list[Saved]] = {"plan": [], "dispatch": [], "combine": []}

    def watched(step: str, function: Any, *args: Any) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            has = any(tensor.data_ptr() == mine.data_ptr() for mine in callers if mine.numel())
            saved[step].append(Saved(tuple(tensor.shape), tensor.dtype, has))
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            return function(*args)

    plan = watched("plan", mf.plan, experts, weights, NUM_EXPERTS)
    callers += [part for part in plan if isinstance(part, Tensor)]
    rows = watched("dispatch", mf.dispatch, x, plan)
    made = rows * 2  # what the experts gave
    callers.append(made)
    watched("combine", mf.combine, made, plan)
    return saved, {"N": made.shape[0], "R": plan.weights.shape[0]}


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_is_kept_for_backward_but_indices_and_what_the_caller_has_anyway(ranks: int) -> None:
    for saved, size in run_ranks(saved_here, ranks):
        assert saved["dispatch"]
        assert all(not each.dtype.is_floating_point for step in ("plan", "dispatch") for each in saved[step])
        floating = [each for each in saved["combine"] if each.dtype.is_floating_point]
        rows, weights = Saved((size["N"], D), torch.float32, True), Saved((size["R"], 3), torch.float32, True)
        assert floating == [rows, weights]  # the experts' rows and their weights: the weights' and rows' gradients need them
        assert all(each.callers for step in ("dispatch", "combine") for each in saved[step] if 0 not in each.shape)
