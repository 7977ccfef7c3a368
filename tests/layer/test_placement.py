"""Experts placed anywhere, and on several ranks: the layer is the same, and replicas stay alike as one expert would."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import moecomm.functional as mf
from moecomm.errors import MoECommError
from moecomm.ops.base.signature import LENGTH
from tests import layers, one_process, reference
from tests.one_process import RATE, Run, Sizes
from tests.spawn import FOUR, run_ranks
from tests.traffic import Traffic

D, H = 5, 4
CLIP = 0.3  # below the norms of all steps
TOKENS = {1: (9,), 2: (8, 0), 4: (5, 0, 11, 3)}
Rows = list[list[int]]


class Case(NamedTuple):
    k: int
    num_experts: int
    placement: Rows


def place(num_experts: int, ranks: int, local: int, seed: int) -> Rows:
    """Each expert on a rank by chance, and where there is room others again."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(num_experts, generator=generator).tolist()
    rows = [shuffled[rank::ranks] for rank in range(ranks)]
    for row in rows:
        others = [e for e in torch.randperm(num_experts, generator=generator).tolist() if e not in row]
        row += others[: local - len(row)]
        row[:] = [row[i] for i in torch.randperm(local, generator=generator).tolist()]
    return rows


def cases(ranks: int) -> list[Case]:
    sizes = {
        1: [(1, 6, 6), (8, 8, 8)],
        2: [(1, 6, 3), (2, 6, 3), (2, 5, 4), (2, 2, 2), (8, 8, 5)],
        4: [(1, 8, 2), (1, 3, 2), (2, 8, 2), (2, 8, 4), (2, 2, 1), (8, 8, 2), (8, 9, 4), (8, 8, 8)],
    }[ranks]
    return [Case(k, e, place(e, ranks, local, seed)) for seed, (k, e, local) in enumerate(sizes)]


def problem(case: Case, tokens: int) -> dict[str, Tensor]:
    """What `reference.layer_and_gradients` takes, for the tokens of all ranks."""
    generator = torch.Generator().manual_seed(case.k * case.num_experts)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    experts = torch.rand(tokens, case.num_experts, generator=generator).argsort(1)[:, : case.k]
    experts = experts.masked_fill(torch.rand(experts.shape, generator=generator) < 0.2, -1)
    weights, up, down = normal(tokens, case.k), normal(case.num_experts, D, H), normal(case.num_experts, H, D)
    return {"x": normal(tokens, D), "experts": experts, "weights": weights, "up": up, "down": down, "grad": normal(tokens, D)}


def layer_here(case: Case, placement: Any) -> dict[str, Tensor]:
    rank, tokens = dist.get_rank(), TOKENS[dist.get_world_size()]
    of = problem(case, sum(tokens))
    own = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    x, weights = (of[name][own].clone().requires_grad_() for name in ("x", "weights"))
    up, down = (of[name][case.placement[rank]].requires_grad_() for name in ("up", "down"))
    plan = mf.plan(of["experts"][own], weights, case.num_experts, placement=placement, like=x)
    assert plan.offsets.shape == (len(case.placement[rank]),)
    rows = layers.experts_by_row(mf.dispatch(x, plan), up.transpose(1, 2), down.transpose(1, 2), plan.offsets)
    y = mf.combine(rows, plan)
    y.backward(of["grad"][own])
    mf.sync_replica_grads_([up, down], placement)
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, "up": up.grad, "down": down.grad}


def layers_here(of: list[Case]) -> list[dict[str, Tensor]]:
    forms: list[Any] = [lambda rows: rows, lambda rows: tuple(map(tuple, rows)), lambda rows: torch.tensor(rows, dtype=torch.int16)]
    return [layer_here(case, forms[i % 3](case.placement)) for i, case in enumerate(of)]


@pytest.mark.parametrize("ranks", [1, 2, FOUR])
def test_the_layer_and_its_gradients_are_the_same_wherever_the_experts_are(ranks: int) -> None:
    parts = run_ranks(layers_here, ranks, cases(ranks))
    for case, *here in zip(cases(ranks), *parts, strict=True):
        want = reference.layer_and_gradients(**problem(case, sum(TOKENS[ranks])))
        for name in ("y", "x", "weights"):
            torch.testing.assert_close(torch.cat([part[name] for part in here]), want[name], rtol=1e-10, atol=1e-12)
        for name in ("up", "down"):
            alike: dict[int, Tensor] = {}
            for part, row in zip(here, case.placement, strict=True):
                torch.testing.assert_close(part[name], want[name][row], rtol=1e-10, atol=1e-12)
                for expert, gradient in zip(row, part[name], strict=True):
                    assert torch.equal(alike.setdefault(expert, gradient), gradient)  # the same bits on all replicas


def travel_here(case: Case) -> list[tuple[list[list[int]], list[int]]]:
    """The pairs that this rank sends to each, as (token, rank), by their source, and the rows of each local expert."""
    rank, tokens = dist.get_rank(), TOKENS[4]
    of = problem(case, sum(tokens))
    own = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    plan = mf.plan(of["experts"][own], of["weights"][own], case.num_experts, placement=case.placement)
    assert plan.send_order is not None
    assert plan.splits is not None
    to = torch.arange(4).repeat_interleave(plan.splits[0])
    token = plan.send_order // case.k
    return torch.stack((token, to), 1).tolist(), plan.offsets.tolist()


def test_a_token_travels_once_to_a_rank_and_each_of_its_slots_to_one_replica() -> None:
    case = Case(8, 9, place(9, 4, 4, seed=1))
    parts = run_ranks(travel_here, 4, case)
    for pairs, _ in parts:
        assert len({tuple(pair) for pair in pairs}) == len(pairs)
    rows = torch.zeros(9, dtype=torch.int64)
    for (_, offsets), held in zip(parts, case.placement, strict=True):
        rows.index_add_(0, torch.tensor(held), torch.tensor(offsets).diff(prepend=torch.tensor([0])))
    experts = problem(case, sum(TOKENS[4]))["experts"]
    assert rows.tolist() == torch.bincount(experts.flatten() + 1, minlength=10)[1:].tolist()


def cost_here(placement: Any) -> tuple[list[str], list[list[int]], list[str]]:
    """What a layer sends and reads."""
    x, experts = torch.ones(6, D), torch.arange(12).view(6, 2) % 4
    with Traffic() as traffic:
        plan = mf.plan(experts, torch.ones(6, 2), 4, placement=placement)
        mf.combine(mf.dispatch(x, plan), plan)
    return traffic.collectives, traffic.bytes, traffic.reads


def test_a_placement_costs_no_message_no_byte_and_no_read_of_the_device() -> None:
    contiguous = [[0, 1], [2, 3]]
    plain = run_ranks(cost_here, 2, None)
    assert plain[0][2] == ["plan_sizes"]
    assert run_ranks(cost_here, 2, contiguous) == run_ranks(cost_here, 2, torch.tensor(contiguous)) == plain


HOT = [[0, 1], [0, 2], [0, 3], [4, 5]]


def hot_here(tokens: int) -> list[int]:
    """Rows of each local expert where all tokens choose expert 0, and a second one by chance."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    experts = torch.stack((torch.zeros(tokens, dtype=torch.int64), torch.randint(1, 6, (tokens,), generator=generator)), 1)
    plan = mf.plan(experts, torch.ones(tokens, 2), 6, placement=HOT)
    return plan.offsets.diff(prepend=plan.offsets.new_zeros(1)).tolist()


@pytest.mark.parametrize("tokens", [1, 7, 1024])
def test_the_replicas_of_a_hot_expert_have_about_as_many_rows(tokens: int) -> None:
    rows = [counts[0] for counts in run_ranks(hot_here, 4, tokens)[:3]]
    assert sum(rows) == 4 * tokens
    assert max(rows) - min(rows) <= 3


class Spread(NamedTuple):
    """Over how many ranks a training is spread, how many of them hold the experts, and where."""

    ranks: int
    ep: int
    placement: Rows


TRAININGS = {
    "permuted": Spread(2, 2, [[6, 1, 4, 3], [0, 7, 2, 5]]),
    "two replicas": Spread(2, 2, [[6, 1, 4, 3, 0], [0, 7, 2, 5, 6]]),
    "several replicas": Spread(4, 4, [[0, 1, 2], [0, 3, 4], [5, 0, 6], [7, 0, 3]]),
    "replicas and expert-data parallelism": Spread(4, 2, [[6, 1, 4, 3, 0], [0, 7, 2, 5, 6]]),
}


def train(sizes: Sizes, how: Spread, steps: int, compiled: bool) -> Run:
    """`one_process.train` on this rank's share of the batch, with the experts of its row of the placement."""
    mesh = init_device_mesh("cpu", (how.ranks // how.ep, how.ep), mesh_dim_names=("edp", "ep"))
    rank, row = mesh.get_rank(), how.placement[mesh.get_local_rank("ep")]
    initial = one_process.initial(sizes)
    parameters = {name: (p[row] if "experts" in name else p).clone().requires_grad_() for name, p in initial.items()}
    experts = {name: p for name, p in parameters.items() if "experts" in name}
    if mesh.get_local_rank("ep") == how.ep - 1:  # not yet as the first rank has it
        with torch.no_grad():
            for p in experts.values():
                p[[i for i, expert in enumerate(row) if any(expert in other for other in how.placement[: how.ep - 1])]] = 7.0
    mf.sync_replicas_(experts, how.placement, mesh["ep"])
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE)
    spread: dict[Any, Any] = {"*experts*": mesh["ep"], "*": ""}
    replicas: dict[Any, Any] = {"*experts*": (how.placement, mesh["ep"])}

    def forward(parameters: dict[str, Tensor], x: Tensor, y: Tensor, placement: Tensor) -> Tensor:
        return layers.loss(parameters, x, y, sizes, lambda x, *own: layers.moe(x, *own, sizes.top_k, mesh["ep"], None, placement))

    step_loss = torch.compile(forward, fullgraph=True, backend="aot_eager") if compiled else forward
    losses, norms = [], []
    for step in range(steps):
        x, y = (whole.chunk(how.ranks)[rank] for whole in one_process.batch(sizes, step))
        loss = step_loss(parameters, x, y, torch.tensor(how.placement))
        (loss / how.ranks).backward()
        mf.sync_replica_grads_(experts, how.placement, mesh["ep"])
        for name, p in parameters.items():
            mf.sync_grads_([p], mesh["edp"] if name in experts else None, reduce="sum")
        norms.append(mf.clip_grad_norm_(parameters, CLIP, spread, replicas).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mf.slice_gather(loss.detach()[None], None).mean().item())
    return Run(losses, norms, {name: p.detach() for name, p in parameters.items()})


@pytest.mark.parametrize(
    ("how", "compiled"),
    [
        *(pytest.param(how, False, marks=() if how == "two replicas" else pytest.mark.slow) for how in TRAININGS),
        *(pytest.param(how, True, marks=[pytest.mark.slow, pytest.mark.exhaustive]) for how in TRAININGS),
    ],
)
def test_training_with_placed_and_replicated_experts_is_that_of_one_process(how: str, compiled: bool) -> None:
    sizes, steps = Sizes(), 6
    expected, placed = one_process.train(sizes, steps, CLIP), TRAININGS[how]
    assert min(expected.norms) > CLIP
    for rank, run in enumerate(run_ranks(train, placed.ranks, sizes, placed, steps, compiled)):
        row = placed.placement[rank % placed.ep]
        # float64 on both sides: only the order of sums differs.
        torch.testing.assert_close(run.losses, expected.losses, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(run.norms, expected.norms, rtol=1e-9, atol=1e-12)
        for name, want in expected.parameters.items():
            torch.testing.assert_close(run.parameters[name], want[row] if "experts" in name else want, rtol=1e-8, atol=1e-10)


SHARED = [[2, 0, 1], [0, 3, 2], [4, 5, 0], [1, 5, 4]]  # experts with 3 replicas, 2 and 1


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[3, ...]: what a rank has, whose sums round."""
    return (100 * torch.randn(3, *shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)).to(dtype)


SHAPES = {torch.float32: (2, 3), torch.bfloat16: (), torch.float64: (4,), torch.complex64: (0, 2)}


def sums_here() -> tuple[dict[torch.dtype, Tensor], list[bool], list[str], list[list[int]], list[str]]:
    rank = dist.get_rank()
    weights = {dtype: torch.zeros(3, *shape, dtype=dtype).requires_grad_() for dtype, shape in SHAPES.items()}
    for dtype, weight in weights.items():
        weight.grad = values(rank, SHAPES[dtype], dtype)
    # On rank 1 alone, on no rank, and never.
    some, none, frozen = (torch.zeros(3, 2).requires_grad_(needed) for needed in (True, True, False))
    if rank == 1:
        some.grad = torch.ones(3, 2)
    with Traffic() as traffic:
        mf.sync_replica_grads_({**{str(dtype): w for dtype, w in weights.items()}, "some": some, "none": none, "frozen": frozen}, SHARED)
    assert none.grad is None
    assert frozen.grad is None
    if some.grad is not None:
        assert some.grad[:, 0].tolist() == [float(expert in SHARED[1]) if rank != 1 else 1.0 for expert in SHARED[rank]]
    return {dtype: w.grad for dtype, w in weights.items()}, some.grad is not None, traffic.collectives, traffic.bytes, traffic.reads


def test_gradients_of_replicas_are_added_in_the_order_of_the_ranks_and_rounded_once() -> None:
    results = run_ranks(sums_here, 4)
    for dtype, shape in SHAPES.items():
        wide = torch.promote_types(dtype, torch.float32)
        sums = {expert: torch.zeros(shape, dtype=wide) for expert in range(6)}
        for rank, row in enumerate(SHARED):
            for expert, gradient in zip(row, values(rank, shape, dtype), strict=True):
                sums[expert] = sums[expert] + gradient.to(wide)
        for row, (grads, *_) in zip(SHARED, results, strict=True):
            for expert, gradient in zip(row, grads[dtype], strict=True):
                assert torch.equal(gradient, sums[expert].to(dtype))
    for rank, (_, some, collectives, bytes_of, reads) in enumerate(results):
        assert some == (rank in (0, 1, 2))  # rank 3 has no expert of rank 1
        assert collectives == ["all_to_all_single"] * 4  # one a dtype
        floats = (6 + 1) + 2 * (2 + 1)  # of a slot: the elements of each float32 tensor, and whether it has a gradient
        shared = [len({*SHARED[rank]} & {*row}) if p != rank else 0 for p, row in enumerate(SHARED)]
        assert bytes_of[0] == [4 * floats * n for n in shared]
        assert reads.count("__bool__") == (1 if rank == 1 else 2)  # one for each weight without a gradient here


def dtensors_here() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    placement = [[0, 1], [2, 0]]
    local = torch.full((2, 3), float(mesh.get_rank() + 1))
    weight = DTensor.from_local(local, mesh["ep"], [Shard(0)]).requires_grad_()
    weight.to_local().square().sum().backward()
    mf.sync_replica_grads_([weight], placement, mesh["ep"])
    edp, ep = mesh.get_coordinate()
    assert isinstance(weight.grad, DTensor)
    assert weight.grad.to_local()[placement[ep].index(0)].tolist() == [2.0 * (4 * edp + 3)] * 3
    mf.sync_replicas_([weight], placement, mesh["ep"])
    assert weight.to_local()[placement[ep].index(0)].tolist() == [2.0 * edp + 1] * 3
    assert weight.to_local()[1 - placement[ep].index(0)].tolist() == [mesh.get_rank() + 1.0] * 3


def test_replicas_of_dtensors_are_their_local_shards() -> None:
    run_ranks(dtensors_here, 4)


def overwritten_here() -> list[Tensor]:
    rank = dist.get_rank()
    tensors = [values(rank, (2,), dtype) for dtype in (torch.float16, torch.int8, torch.complex128, torch.bool, torch.float16)]
    tensors.append(values(rank, (4, 3), torch.float32).transpose(1, 2))
    module = torch.nn.ParameterList([torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) for tensor in tensors])
    strides = [tensor.stride() for tensor in tensors]
    assert mf.sync_replicas_(module, SHARED) is None
    assert [parameter.stride() for parameter in module] == strides
    return [parameter.detach() for parameter in module]


def test_replicas_become_what_their_experts_first_rank_has() -> None:
    results = run_ranks(overwritten_here, 4)
    for i, dtype in enumerate((torch.float16, torch.int8, torch.complex128, torch.bool, torch.float16, torch.float32)):
        for row, result in zip(SHARED, results, strict=True):
            for expert, got in zip(row, result[i], strict=True):
                first = next(rank for rank, held in enumerate(SHARED) if expert in held)
                want = values(first, (4, 3) if i == 5 else (2,), dtype)[SHARED[first].index(expert)]
                assert torch.equal(got, want.t() if i == 5 else want)


def nothing_to_do_here() -> list[str]:
    weight = torch.ones(2, 3, requires_grad=True)
    weight.grad = torch.ones(2, 3)
    with Traffic() as traffic:
        mf.sync_replica_grads_([weight], [[0, 3], [1, 2]])
        mf.sync_replica_grads_([], SHARED[:2])
        mf.sync_replicas_([], SHARED[:2])
    return traffic.collectives


def test_without_replicas_or_weights_nothing_is_sent() -> None:
    assert run_ranks(nothing_to_do_here, 2) == [[], []]


def disagree_here(what: str) -> str:
    rank = dist.get_rank()
    experts, weights = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    same, mine = [[0, 1], [2, 3]], [[[0, 1], [2, 3]], [[0, 1], [3, 2]]][rank]
    with pytest.raises(MoECommError) as raised:
        {
            "order": lambda: mf.plan(experts, weights, 4, placement=mine),
            "experts a rank": lambda: mf.plan(experts, weights, 4, placement=[[[0, 1], [2, 3]], [[0, 1, 2], [2, 3, 0]]][rank]),
            "whether there is one": lambda: mf.plan(experts, weights, 4, placement=[None, same][rank]),
            "order for sync_replicas_": lambda: mf.sync_replicas_([torch.zeros(2, 3)], mine),
            "weights": lambda: mf.sync_replicas_([torch.zeros(2, 3 + rank)], same),
        }[what]()
    dist.barrier()  # the group still works
    return str(raised.value)


CHECKSUM = "of checksum [0-9a-f]{8}"
DISAGREEMENTS = {
    "order": f"placement was {CHECKSUM} on rank 0, {CHECKSUM} on rank 1",
    "experts a rank": f"placement was {CHECKSUM} on rank 0, {CHECKSUM} on rank 1",
    "whether there is one": f"placement was not given on rank 0, {CHECKSUM} on rank 1",
    "order for sync_replicas_": f"placement was {CHECKSUM} on rank 0, {CHECKSUM} on rank 1",
    "weights": r"params' tensor 0 was float32 \[2, 3\] on rank 0, float32 \[2, 4\] on rank 1",
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_ranks_that_disagree_on_the_placement_get_the_same_error(what: str) -> None:
    one, other = run_ranks(disagree_here, 2, what)
    assert one == other
    assert re.fullmatch(DISAGREEMENTS[what] + " of the group; it must be .*the same.* on every rank", one)


class NoLength:
    def __getitem__(self, i: int) -> list[int]:
        return [0, 1]


LISTS = "a list of lists of ints, [P, L], or an integer tensor on the CPU"
SHAPE = "it must be of shape [P, L], for the group's 2 ranks, 1 or more experts each"
TWICE = "placement was [0, 1, 1] on rank 0; it must be of different experts on a rank"
UNEVEN = "placement was of [2, 3] experts; it must be of as many on each rank; a rank with room takes a replica"
FLOATS = "placement was of dtype torch.float32; it must be of dtype int8, int16, int32, int64 or uint8"
NOWHERE = "placement was without experts [2]; it must be of all 4 experts, each on some rank"
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no list": (NoLength(), TypeError, f"placement was NoLength; it must be {LISTS}"),
    "flat": ([0, 1], TypeError, f"placement was list; it must be {LISTS}"),
    "ids that are floats": ([[0, 1.0], [2, 3]], TypeError, "placement was with 1.0; it must be of ints"),
    "ids that are bools": ([[0, True], [2, 3]], TypeError, "placement was with True; it must be of ints"),
    "uneven": ([[0, 1], [2, 3, 1]], ValueError, UNEVEN),
    "too few ranks": ([[0, 1, 2, 3]], ValueError, f"placement was of shape [1, 4]; {SHAPE}"),
    "no ranks": ([], ValueError, f"placement was of shape [0, 0]; {SHAPE}"),
    "no experts": ([[], []], ValueError, f"placement was of shape [2, 0]; {SHAPE}"),
    "a tensor of floats": (torch.ones(2, 2), TypeError, FLOATS),
    "a tensor of one dim": (torch.arange(4), ValueError, "placement was of shape [4]; it must be of shape [P, L]"),
    "a tensor elsewhere": (torch.zeros(2, 2, dtype=torch.int64, device="meta"), ValueError, "placement was on meta; it must be on the CPU"),
    "an id out of range": ([[0, 1], [3, 4]], ValueError, "placement was [3, 4] on rank 1; it must be of ids in [0, num_experts) = [0, 4)"),
    "an expert twice on a rank": ([[0, 1, 1], [2, 3, 0]], ValueError, TWICE),
    "an expert nowhere": ([[0, 1], [3, 0]], ValueError, NOWHERE),
}


def refused_here() -> None:
    """The refusal is sent where the other rank waits for a message, and nothing else is."""
    for name, (placement, error, message) in WRONG.items():
        calls = [(lambda p=placement: mf.plan(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2), 4, placement=p), 1)]
        if name != "an id out of range":
            calls += [
                (lambda p=placement, f=f: f(torch.ones(2, 2), p), f is mf.sync_replicas_)
                for f in (mf.sync_replicas_, mf.sync_replica_grads_)
            ]
        for call, sent in calls:
            with Traffic() as traffic, pytest.raises(error) as raised:
                call()
            assert str(raised.value).split(". ")[0] == message, name
            assert traffic.bytes == [[8 * LENGTH] * 2] * sent
            assert len(traffic.collectives) == 2 * sent  # torch's function, and its op
    with pytest.raises(ValueError, match="num_experts was 0; it must be at least 1"):
        mf.plan(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2), 0, placement=[[0], [1]])
    slots = r"it must be of shape \[2, ...\], with the placement's L = 2 experts"
    for function in (mf.sync_replicas_, mf.sync_replica_grads_):
        for shape in ((3, 2), ()):
            with pytest.raises(ValueError, match=slots):
                function([torch.ones(2, 2), torch.ones(shape, requires_grad=True)], [[0, 1], [1, 2]])
        with pytest.raises(ValueError, match="params was on cpu and on meta; it must be on one device"):
            function([weight.requires_grad_() for weight in (torch.ones(2), torch.ones(2, device="meta"))], [[0, 1], [1, 2]])
        with pytest.raises(TypeError, match="params was int"):
            function(3, [[0, 1], [1, 2]])
    sparse = torch.ones(2, 2, requires_grad=True)
    sparse.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(TypeError, match="a gradient of layout torch.sparse_coo; it must be tensors with dense gradients"):
        mf.sync_replica_grads_([sparse], [[0, 1], [1, 2]])


def test_a_wrong_placement_is_named_before_anything_is_sent() -> None:
    run_ranks(refused_here, 2)


def compiled_here(backend: str) -> list[str]:
    torch._dynamo.reset()
    ranks, graphs = dist.get_world_size(), []
    tokens = torch.randn(6, D, generator=torch.Generator().manual_seed(dist.get_rank()))
    experts = torch.stack((torch.arange(6) % 5, (torch.arange(6) + 1) % 5), 1)

    def layer(x: Tensor, placement: Any) -> tuple[Tensor, Tensor]:
        plan = mf.plan(experts, torch.ones(6, 2), 5, placement=placement)
        return mf.combine(mf.dispatch(x, plan) * 2, plan), plan.offsets

    def recorded(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    placements = [torch.tensor(place(5, ranks, 4, seed)) for seed in range(4)]
    for placement in placements:
        for got, want in zip(compiled(tokens, placement), layer(tokens, placement), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count == 1
    for got, want in zip(compiled(tokens, placements[0].tolist()), layer(tokens, placements[0]), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="it must be of different experts on a rank"):
        compiled(tokens, torch.zeros_like(placements[0]))
    with pytest.raises(MoECommError, match="placement was of checksum"):
        compiled(tokens, placements[dist.get_rank()])
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=recorded))(tokens, placements[0])
    return graphs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "backend"),
    [(2, "aot_eager"), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((2, "inductor"), (4, "aot_eager")))],
)
def test_a_compiled_layer_takes_any_placement_and_is_one_graph_on_all_ranks(ranks: int, backend: str) -> None:
    first, *others = run_ranks(compiled_here, ranks, backend, timeout=200)
    assert first
    assert all(other == first for other in others)
