"""DTensors through what is beside the layer, losses, bias and capacity: the numbers and gradients of one process, and nothing gathered."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import moecomm.functional as mf
from moecomm.parallel.group import GroupLike
from tests.spawn import run_ranks
from tests.traffic import Traffic

TOKENS, WIDTH, EXPERTS, K, CAPACITY = 11, 6, 4, 2, 3
GATHER, EXCHANGE, REDUCE = "all_gather_into_tensor", "all_to_all_single", "all_reduce"
Placements = tuple[Placement, ...]
S0, R, P = Shard(0), Replicate(), Partial()

# Tokens placed on a mesh (2, 2), named a and b; the group: all ranks, those along a mesh dim, or ranks (0, 0) and (1, 1), which are no
# dim's; then how the balance loss must be placed.
CASES: dict[str, tuple[Placements, str | None, Placements]] = {
    "all ranks": ((S0, S0), None, (R, R)),
    "a, replicated over b": ((S0, R), "a", (R, R)),
    "b, replicated over a": ((R, S0), "b", (R, R)),
    "a, and other tokens over b": ((S0, S0), "a", (R, P)),
    "across both": ((S0, S0), "across", (P, P)),
}


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, gate = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((TOKENS, WIDTH), (WIDTH, EXPERTS)))
    mask = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64)
    mask[2], mask[4, 0] = -torch.inf, -torch.inf  # a token that may have no expert, and one that may not have the first
    return {"x": x, "gate": gate, "mask": mask}


def balance(probabilities: Tensor, experts: Tensor) -> Tensor:
    """The loss of one group's tokens, by its definition."""
    slots = torch.nn.functional.one_hot(experts[experts >= 0], EXPERTS).double()  # [slots, E]
    return EXPERTS * (slots.mean(0) * probabilities[(experts >= 0).any(1)].mean(0)).sum()


def groups_tokens(placements: Placements, group: str | None) -> list[Tensor]:
    """Which tokens the groups count together, of those that have different ones."""
    if group is None or placements != (S0, S0):
        return [torch.arange(TOKENS)]
    parts = [part for half in torch.arange(TOKENS).chunk(2) for part in half.chunk(2)]  # of ranks (0, 0), (0, 1), (1, 0) and (1, 1)
    pairs = {"a": ((0, 2), (1, 3)), "across": ((0, 3), (1, 2))}[group]
    return [torch.cat([parts[rank] for rank in pair]) for pair in pairs]


def expected(placements: Placements, group: str | None) -> dict[str, Tensor]:
    """On one process: the mean of the groups' balance losses and all tokens' z-loss, what they make of the gate, and who is served."""
    x, gate, mask = data().values()
    logits = x @ gate.requires_grad_()
    experts = (logits + mask).topk(K).indices.masked_fill((mask == -torch.inf).all(1, keepdim=True), -1)
    tokens = groups_tokens(placements, group)
    losses = {
        "balance": torch.stack([balance(logits.softmax(1)[own], experts[own]) for own in tokens]).mean(),
        "z": (logits + mask)[mask[:, 1] == 0].logsumexp(1).square().mean(),
    }
    (grad,) = torch.autograd.grad(1.5 * losses["balance"] + losses["z"], gate)
    kept = experts.clone()
    for own in tokens:
        left = [CAPACITY] * EXPERTS
        for t in own.tolist():
            for j, expert in enumerate(experts[t].tolist()):
                if expert >= 0:
                    left[expert] -= 1
                    kept[t, j] = expert if left[expert] >= 0 else -1
    return {**{name: loss.detach() for name, loss in losses.items()}, "grad": grad, "kept": kept}


def losses(x: Tensor, gate: Tensor, mask: Tensor, group: GroupLike) -> tuple[Tensor, ...]:
    """The sum of both losses, with half of the first attached to x; and both, and the experts within the capacity."""
    logits = x @ gate
    _, experts = mf.route(logits + mask, K)
    balance, z = mf.load_balance_loss(logits.softmax(1), experts, group), mf.z_loss(logits + mask)
    attached = mf.attach_loss(x, balance, 0.5)
    kept = mf.limit_by_capacity(experts, EXPERTS, CAPACITY, group)
    assert attached.placements == x.placements
    return balance + z + 0 * attached.sum(), balance.detach(), z.detach(), kept


@functools.cache
def one_mesh() -> DeviceMesh:
    """One and the same for all cases, by a name that no other test has: torch 2.13 cannot compile DTensor's own ops on a mesh that equals
    an earlier one, since what it remembers of an op has the earlier mesh in it ("Node tangents_2 was invalid, but is output")."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("losses a", "losses b"))


def group_of(name: str | None, mesh: DeviceMesh) -> GroupLike:
    if name == "across":
        return torch.distributed.new_subgroups_by_enumeration([[0, 3], [1, 2]])[0]
    return None if name is None else (mesh, "ab".index(name))


def run(case: str, compiled: bool) -> dict[str, Tensor]:
    torch._dynamo.reset()
    placements, name, must = CASES[case]
    mesh = one_mesh()
    group = group_of(name, mesh)
    x, mask = (distribute_tensor(data()[key], mesh, placements, src_data_rank=None) for key in ("x", "mask"))
    gate = distribute_tensor(data()["gate"], mesh, [R, R], src_data_rank=None).requires_grad_()
    function = torch.compile(losses, fullgraph=True, backend="aot_eager") if compiled else losses
    loss, balance, z, kept = function(x, gate, mask, group)
    assert balance.placements == must
    assert z.placements == tuple(P if placement == S0 else R for placement in placements)
    assert kept.placements == placements
    assert kept.shape == (TOKENS, K)
    loss.backward()
    whole = {"balance": balance, "z": z, "kept": kept, "grad": gate.grad}
    return {name: value.full_tensor() for name, value in whole.items()}


def run_all(cases: list[str], compiled: bool) -> list[dict[str, Tensor]]:
    return [run(case, compiled) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_losses_of_dtensors_and_their_gradients_are_those_of_one_process(compiled: bool) -> None:
    cases = ["a, and other tokens over b"] if compiled else list(CASES)
    for results in run_ranks(run_all, 4, cases, compiled, timeout=200):
        for case, result in zip(cases, results, strict=True):
            for name, want in expected(*CASES[case][:2]).items():
                if name != "kept" or CASES[case][0] != (S0, S0) or CASES[case][1] is None:  # else served in the order of the ranks
                    torch.testing.assert_close(result[name], want, rtol=1e-10, atol=1e-12, msg=lambda m, c=(case, name): f"{c} {m}")


def sent(function: Callable[[], Tensor], grad: bool) -> tuple[list[str], list[str]]:
    """What a call and its backward send."""
    with Traffic() as forward:
        y = function()
    with Traffic() as backward:
        if grad:
            y.backward()
    return forward.collectives, backward.collectives


def traffic_here(case: str) -> dict[str, tuple[list[str], list[str]]]:
    """Of each function; and that it gives what the plain call gives on the local shards, where all ranks have it alike."""
    placements, name, must = CASES[case]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    group = group_of(name, mesh)
    logits = distribute_tensor(torch.randn(TOKENS, EXPERTS, dtype=torch.float64), mesh, placements, src_data_rank=None).requires_grad_()
    experts = distribute_tensor(torch.randint(-1, EXPERTS, (TOKENS, K)), mesh, placements, src_data_rank=None)
    plain, own = logits.detach().to_local(), experts.to_local()
    if must == (R, R):
        assert torch.equal(mf.load_balance_loss(logits, experts, group).to_local(), mf.load_balance_loss(plain, own, group))
        bias = distribute_tensor(torch.randn(EXPERTS), mesh, [R, R])
        after = mf.update_bias(bias, experts, group=group)
        assert after.placements == (R, R)
        assert torch.equal(after.to_local(), mf.update_bias(bias.to_local(), own, group=group))
    assert torch.equal(mf.limit_by_capacity(experts, EXPERTS, 2, group).to_local(), mf.limit_by_capacity(own, EXPERTS, 2, group))
    mixed = mf.load_balance_loss(logits, own, group)  # a plain tensor is a local shard already
    assert torch.equal(mixed.to_local(), mf.load_balance_loss(logits, experts, group).to_local())
    return {
        "balance": sent(lambda: mf.load_balance_loss(logits, experts, group), True),
        "z": sent(lambda: mf.z_loss(logits), True),
        "bias": sent(lambda: mf.update_bias(torch.zeros(EXPERTS), experts, group=group), False),
        "capacity": sent(lambda: mf.limit_by_capacity(experts, EXPERTS, 2, group), False),
    }


def all_traffic() -> list[dict[str, tuple[list[str], list[str]]]]:
    return [traffic_here(case) for case in CASES]


@pytest.mark.slow
def test_dtensors_send_what_their_local_shards_would_and_the_gradient_of_a_loss_that_all_ranks_have_is_not_sent() -> None:
    for results in run_ranks(all_traffic, 4, timeout=200):
        for case, traffic in zip(CASES, results, strict=True):
            sharded, name = CASES[case][0].count(S0), CASES[case][1]
            assert traffic == {
                "balance": ([GATHER], [EXCHANGE] if name == "across" else []),
                "z": ([REDUCE] * sharded, []),
                "bias": ([REDUCE], []),
                "capacity": ([GATHER], []),
            }, case


def wrong_here() -> list[tuple[str, list[str]]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))

    def on_mesh(t: Tensor, *placements: Placement) -> DTensor:
        if any(p.is_partial() for p in placements):
            return DTensor.from_local(t, mesh, placements, run_check=False)
        return distribute_tensor(t, mesh, placements, src_data_rank=None)

    p, e, bias = torch.rand(8, EXPERTS), torch.zeros(8, K, dtype=torch.int64), torch.zeros(EXPERTS)
    calls = [
        lambda: mf.load_balance_loss(on_mesh(p, S0, Shard(1)), on_mesh(e, S0, R), mesh["a"]),
        lambda: mf.load_balance_loss(on_mesh(p, S0, R), on_mesh(e, S0, S0), mesh["a"]),
        lambda: mf.load_balance_loss(on_mesh(p, S0, R), on_mesh(e, S0, R), None),
        lambda: mf.z_loss(on_mesh(p, S0, P)),
        lambda: mf.limit_by_capacity(on_mesh(e, S0, R), EXPERTS, 2, mesh["b"]),
        lambda: mf.update_bias(on_mesh(bias, R, S0), e, group=None),
        lambda: mf.update_bias(on_mesh(bias, R, R), on_mesh(e, S0, S0), group=mesh["a"]),
    ]
    said = []
    for call in calls:
        with pytest.raises(ValueError, match="it must be") as error, Traffic() as traffic:
            call()
        said.append((str(error.value), traffic.collectives))
    return said


def test_a_placement_that_makes_no_sense_is_an_error_before_anything_is_sent() -> None:
    says = [
        "probabilities was Shard(dim=1) on dim 1 of its mesh; it must be Shard(0) or Replicate() there, with each token's E whole",
        "experts was a DTensor placed (Shard(dim=0), Shard(dim=0)) on a mesh of (2, 2); it must be sharded over tokens as probabilities is",
        "probabilities was Replicate() on dim 1 of its mesh; it must be Shard(0) there, as slice_scatter",
        "logits was Partial(sum) on dim 1 of its mesh; it must be Shard(0) or Replicate() there",
        "experts was Replicate() on dim 1 of its mesh; it must be Shard(0) there",
        "bias was Shard(dim=0) on dim 1 of its mesh; it must be Replicate() there",
        "group was of 2 ranks, with tokens a DTensor placed (Shard(dim=0), Shard(dim=0)) on a mesh of (2, 2); it must be of all ranks",
    ]
    for rank in run_ranks(wrong_here, 4, timeout=200):
        for (message, collectives), start in zip(rank, says, strict=True):
            assert message.startswith(start)
            assert collectives == []
