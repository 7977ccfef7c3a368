"""DTensors through the layer: placed as x, with the numbers of one process, and with no exchange that a plain tensor would not need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn.functional import silu

import moecomm.functional as mf
from moecomm.parallel.group import GroupLike
from tests.spawn import run_ranks
from tests.traffic import Traffic

TOKENS, WIDTH, EXPERTS, K = 11, 6, 4, 2
Placements = tuple[Placement, ...]

# What x is placed as on a mesh (2, 2), named a and b, and the mesh dim that the experts are spread over; None: over all ranks.
CASES: list[tuple[Placements, str | None]] = [
    ((Shard(0), Shard(0)), None),
    ((Shard(0), Shard(0)), "a"),
    ((Shard(0), Shard(0)), "b"),
    ((Shard(0), Replicate()), "a"),
    ((Replicate(), Shard(0)), "b"),
    ((Shard(0), Shard(1)), "a"),
    ((Shard(1), Shard(0)), "b"),
]


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {"x": normal(TOKENS, WIDTH), "gate": normal(WIDTH, EXPERTS), "scale": normal(EXPERTS, WIDTH), "grad": normal(TOKENS, WIDTH)}


def expected() -> dict[str, Tensor]:
    """The layer on one process: each expert scales each hidden element, so that a slice of the hidden dim is enough for it."""
    x, gate, scale, grad = (value.requires_grad_() for value in data().values())
    probabilities = (x @ gate).softmax(1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(K).indices, 1.0)
    weights = probabilities * chosen / (probabilities * chosen).sum(1, keepdim=True)  # [T, E]
    y = torch.einsum("te,ted->td", weights, silu(x.unsqueeze(1) * scale))
    y.backward(grad.detach())
    return {"y": y.detach(), "x": x.grad, "gate": gate.grad, "scale": scale.grad}


def layer(x: Tensor, logits: Tensor, scale: Tensor, group: GroupLike) -> Tensor:
    """``scale`` [L, D]: of this rank's experts and this rank's slice of the hidden dim."""
    weights, experts = mf.route(logits, K)
    plan = mf.plan(experts, weights, EXPERTS, group, like=x)
    rows = mf.dispatch(x, plan)
    expert = torch.searchsorted(plan.offsets, torch.arange(rows.shape[0], dtype=torch.int32), right=True)
    return mf.combine(silu(rows * scale[expert]), plan)


def run_layer(placements: Placements, spread: str | None, compiled: bool) -> dict[str, Tensor]:
    """y and all gradients, as whole tensors."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    group = None if spread is None else mesh[spread]
    given = data()
    x = distribute_tensor(given["x"], mesh, placements, src_data_rank=None).requires_grad_()
    gate = distribute_tensor(given["gate"], mesh, [Shard(0) if p == Shard(1) else Replicate() for p in placements], src_data_rank=None)
    gate.requires_grad_()
    scale = my_slice(given["scale"], mesh, placements, spread).requires_grad_()
    grad = distribute_tensor(given["grad"], mesh, placements, src_data_rank=None)
    rows_alike = [Replicate() if p == Shard(1) else p for p in placements]
    logits = (x @ gate).redistribute(placements=rows_alike)  # the user's own all-reduce, where x is in slices of the hidden dim
    y = (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer)(x, logits, scale, group)
    assert y.placements == placements
    assert y.shape == x.shape
    y.backward(grad)
    assert x.grad.placements == placements
    if not compiled:
        check_sent(x.detach(), logits.detach(), scale.detach(), grad, group, Shard(1) in placements)
    whole = {"y": y.full_tensor().detach(), "x": x.grad.full_tensor(), "gate": gate.grad.full_tensor()}
    return whole | {"scale": whole_slices(scale.grad, mesh, placements, spread)}


def check_sent(x: Tensor, logits: Tensor, scale: Tensor, grad: Tensor, group: GroupLike, in_slices: bool) -> None:
    """A DTensor sends what its local shard would, and where it is in slices the sum of the weights' gradient, [R, K]."""
    sent = []
    for argument, its_logits, its_grad in ((x, logits, grad), (x.to_local(), logits.to_local(), grad.to_local())):
        leaves = [value.detach().requires_grad_() for value in (argument, its_logits, scale)]
        with Traffic() as traffic:
            y = layer(*leaves, group)
        forward = traffic.collectives
        with Traffic() as traffic:
            y.backward(its_grad)
        sent.append((forward, sorted(traffic.collectives)))
    (forward, backward), (plain_forward, plain_backward) = sent
    assert forward == plain_forward
    assert backward == sorted(plain_backward + ["all_gather_into_tensor", "all_to_all_single"] * in_slices)


def my_slice(scale: Tensor, mesh: DeviceMesh, placements: Placements, spread: str | None) -> Tensor:
    """This rank's experts of ``scale`` [E, D], and its slice of the hidden dim."""
    mine = scale.chunk(4)[mesh.get_rank()] if spread is None else scale.chunk(2)[mesh.get_local_rank(spread)]
    for i, placement in enumerate(placements):
        if placement == Shard(1):
            mine = mine.chunk(2, 1)[mesh.get_local_rank(i)]
    return mine.clone()


def whole_slices(grad: Tensor, mesh: DeviceMesh, placements: Placements, spread: str | None) -> Tensor:
    """The gradient of the whole ``scale``, of the parts that the ranks have."""
    if spread is None:
        return mf.slice_gather(grad, None)
    grad = mf.slice_gather(grad, mesh[spread])
    for i, placement in enumerate(placements):
        if placement == Shard(1):
            grad = mf.slice_gather(grad, (mesh, i), dim=1)
        elif placement == Shard(0) and mesh.mesh_dim_names[i] != spread:  # data parallelism: each of these ranks has other tokens
            grad = sum(mf.slice_gather(grad.unsqueeze(0), (mesh, i)))
    return grad


Cases = list[tuple[Placements, str | None]]


def run_layers(cases: Cases, compiled: bool) -> list[dict[str, Tensor]]:
    return [run_layer(placements, spread, compiled) for placements, spread in cases]


@pytest.mark.parametrize(
    ("cases", "compiled"),
    [
        pytest.param(CASES[:2], False, marks=pytest.mark.slow, id="tokens over a and b"),
        pytest.param(CASES[2:], False, marks=pytest.mark.slow, id="all others"),
        pytest.param(CASES[-1:], True, marks=[pytest.mark.slow, pytest.mark.exhaustive], id="slices of the hidden dim, compiled"),
        pytest.param(CASES[:-1], True, marks=[pytest.mark.slow, pytest.mark.exhaustive], id="all others, compiled"),
    ],
)
def test_a_dtensor_goes_through_the_layer_as_on_one_process_and_comes_back_as_it_was_placed(cases: Cases, compiled: bool) -> None:
    right = expected()
    for results in run_ranks(run_layers, 4, cases, compiled, timeout=200):
        for case, whole in zip(cases, results, strict=True):
            for name, value in whole.items():
                torch.testing.assert_close(value, right[name], rtol=1e-10, atol=1e-12, msg=lambda m, c=(case, name): f"{c} {m}")


def flattened(compiled: bool) -> None:
    """[batch, length, D], the batch over a and the length over b, becomes [T, D] with the tokens of each rank as they are."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    generator = torch.Generator().manual_seed(5)
    whole = torch.randn(4, 6, WIDTH, generator=generator, dtype=torch.float64)
    logits = torch.randn(4, 6, EXPERTS, generator=generator, dtype=torch.float64)
    x, its_logits = (distribute_tensor(t, mesh, [Shard(0), Shard(1)], src_data_rank=None) for t in (whole, logits))

    def function(x: Tensor, logits: Tensor) -> Tensor:
        return layer(x.flatten(0, 1), logits.flatten(0, 1), torch.ones(2, WIDTH, dtype=x.dtype), mesh["b"]).view(x.shape)

    y = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(x, its_logits)
    torch.testing.assert_close(y.full_tensor(), silu(whole))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="DTensor cannot flatten two dims that are both sharded before torch 2.13")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.exhaustive])])
def test_sequences_sharded_over_batch_and_length_may_be_flattened_to_tokens(compiled: bool) -> None:
    run_ranks(flattened, 4, compiled)


def across_graphs() -> None:
    """A plan of DTensors leaves one graph and enters another."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    given = data()
    x, logits = (distribute_tensor(t, mesh, [Shard(0), Replicate()], src_data_rank=None) for t in (given["x"], given["x"] @ given["gate"]))

    def first(x: Tensor, logits: Tensor) -> mf.Plan:
        weights, experts = mf.route(logits, K)
        return mf.plan(experts, weights, EXPERTS, mesh["a"], like=x)

    def second(x: Tensor, plan: mf.Plan) -> Tensor:
        return mf.combine(mf.dispatch(x, plan), plan)

    compiled = [torch.compile(function, fullgraph=True, backend="aot_eager") for function in (first, second)]
    plan = compiled[0](x, logits)
    leaves, spec = torch.utils._pytree.tree_flatten(plan)
    y = compiled[1](x, torch.utils._pytree.tree_unflatten(leaves, spec))
    assert y.placements == x.placements
    torch.testing.assert_close(y.full_tensor(), given["x"])


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_plan_of_dtensors_is_a_pytree_that_passes_between_graphs() -> None:
    run_ranks(across_graphs, 4)


def graphs(tokens: tuple[int, ...], dynamic: bool | None, slices: int) -> list[int]:
    """How many there are after each number of tokens, of which the ranks have unequal shares."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2, slices), mesh_dim_names=("a", "b"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=dynamic)
    counts = []
    for number in tokens:
        # Local slices: where ranks send shards, the padded ones come as views of other tensors, which have graphs of their own.
        x = distribute_tensor(torch.ones(number, WIDTH), mesh, [Shard(0), Shard(1)], src_data_rank=None).requires_grad_()
        logits = distribute_tensor(torch.randn(number, EXPERTS), mesh, [Shard(0), Replicate()], src_data_rank=None).requires_grad_()
        y = compiled(x, logits, torch.ones(2, WIDTH // slices, requires_grad=True), mesh["a"])
        assert y.shape == x.shape
        y.to_local().sum().backward()
        counts.append(counter.frame_count)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("slices", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_new_number_of_tokens_makes_one_graph_of_any_number_and_no_more(slices: int) -> None:
    assert run_ranks(graphs, 2 * slices, (11, 13, 17, 8), None, slices, timeout=200) == [[1, 2, 2, 2]] * 2 * slices


@pytest.mark.slow
@pytest.mark.exhaustive
def test_where_sizes_are_dynamic_from_the_first_call_there_are_at_most_two_graphs() -> None:
    # 11 and 12 tokens are 6 for the first ranks, which torch 2.13 does not tell apart unless the sizes are dynamic from the first call.
    assert all(counts[0] == counts[1] and counts[-1] <= 2 for counts in run_ranks(graphs, 4, (11, 12, 17, 8), True, 2, timeout=200))


def wrong(case: str) -> str:
    """The error of a call that makes no sense."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    given = data()

    def on_mesh(t: Tensor, *placements: Placement) -> DTensor:
        if any(p.is_partial() for p in placements):
            return DTensor.from_local(t, mesh, placements, run_check=False)
        return distribute_tensor(t, mesh, placements, src_data_rank=None)

    experts = torch.arange(2 * TOKENS).view(TOKENS, 2) % EXPERTS
    weights = torch.ones(TOKENS, K, dtype=torch.float64)
    alike = Shard(0), Replicate()
    good = on_mesh(experts, *alike), on_mesh(weights, *alike), EXPERTS, mesh["a"]
    x = on_mesh(given["x"], *alike)
    sliced = mf.plan(*good, like=on_mesh(given["x"], Shard(0), Shard(1)))
    calls = {
        "logits in parts": lambda: mf.route(on_mesh(given["x"], Shard(0), Shard(1)), K),
        "logits partial": lambda: mf.route(on_mesh(given["x"], Shard(0), Partial()), K),
        "experts replicated": lambda: mf.plan(good[0], good[1], EXPERTS, mesh["b"]),
        "experts replicated in part": lambda: mf.plan(good[0], good[1], EXPERTS, None),
        "weights partial": lambda: mf.plan(good[0], on_mesh(weights, Shard(0), Partial()), *good[2:]),
        "weights otherwise": lambda: mf.plan(good[0], on_mesh(weights, Shard(0), Shard(0)), *good[2:]),
        "like in parts over the group": lambda: mf.plan(*good[:3], mesh["a"], like=on_mesh(given["x"], Shard(1), Shard(0))),
        "like of other length": lambda: mf.plan(*good, like=on_mesh(given["x"][:5], *alike)),
        "like partial": lambda: mf.plan(*good, like=on_mesh(given["x"], Shard(0), Partial())),
        "like in uneven slices": lambda: mf.plan(*good, like=on_mesh(given["x"][:, :5], Shard(0), Shard(1))),
        "x partial": lambda: mf.dispatch(on_mesh(given["x"], Shard(0), Partial()), mf.plan(*good)),
        "x in slices that like is not": lambda: mf.dispatch(on_mesh(given["x"], Shard(0), Shard(1)), mf.plan(*good)),
        "plan of plain tensors": lambda: mf.dispatch(x, mf.plan(*(t.to_local() for t in good[:2]), *good[2:])),
        "rows a DTensor": lambda: mf.combine(x, mf.plan(*good)._replace(row_order=torch.zeros(x.shape[0]))),
        "rows without the dim": lambda: mf.combine(torch.ones(sliced.row_order.shape[0]), sliced),
    }
    with pytest.raises(ValueError, match="must be") as error:
        calls[case]()
    return str(error.value)


def all_wrong(cases: list[str]) -> list[str]:
    return [wrong(case) for case in cases]


@pytest.mark.slow
def test_a_placement_that_makes_no_sense_is_an_error_that_names_it() -> None:
    says = {
        "logits in parts": r"logits was Shard(dim=1) on dim 1 of its mesh; it must be Shard(0) or Replicate() there",
        "logits partial": "logits was Partial(sum) on dim 1",
        "experts replicated": "experts was Replicate() on dim 1 of its mesh; it must be Shard(0) there, as slice_scatter",
        "experts replicated in part": "experts was Replicate() on dim 1",
        "weights partial": "weights was Partial(sum) on dim 1",
        "weights otherwise": "weights was a DTensor placed (Shard(dim=0), Shard(dim=0)) on a mesh of (2, 2)",
        "like in parts over the group": "like was Shard(dim=1) on dim 0",
        "like of other length": "like was a DTensor",
        "like partial": "like was Partial(sum) on dim 1",
        "like in uneven slices": "like was Shard(dim=1) of 5 on dim 1 of its mesh; it must be a multiple of its 2 ranks long there",
        "x partial": "x was Partial(sum) on dim 1",
        "x in slices that like is not": "give it to plan as like",
        "plan of plain tensors": "it must be x.to_local(), or the plan be made of DTensors",
        "rows a DTensor": "it must be a plain tensor, this rank's rows, as dispatch gives them",
        "rows without the dim": "it must be of 2 dims or more",
    }
    for messages in run_ranks(all_wrong, 4, list(says)):
        for case, message in zip(says, messages, strict=True):
            assert says[case] in message, f"{case}: {message}"
