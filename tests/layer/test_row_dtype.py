"""Experts that give another dtype where they have no rows: every rank's result and gradients are those of the dense layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import moecomm.functional as mf
from moecomm.errors import MoECommError
from tests import reference
from tests.faults.test_bad_input import assert_the_group_still_works
from tests.spawn import run_ranks

D, E, K = 8, 4, 2
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROUTINGS = ("all to one", "one expert of each rank")  # the other experts get no rows


class Case(NamedTuple):
    """A layer whose experts give ``inside`` where they have rows, and hand their rows back where they have none."""

    routing: str = "all to one"
    x: torch.dtype = FP32
    inside: torch.dtype = BF16
    autocast: bool = True
    like: bool = False
    asked: torch.dtype | None = None  # combine's dtype
    max_rows: int | None = None
    wires: tuple[str | None, str | None] = (None, None)
    needed: tuple[str, ...] = ("x", "weights", "w")  # what requires a gradient
    always: bool = False  # compute also where there are no rows

    @property
    def result(self) -> torch.dtype:
        return self.asked or (self.inside if self.autocast else self.x)


def problem(case: Case, tokens: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensors of the whole group; every rank makes the same ones, in the precision that the experts compute in."""
    seed = torch.Generator().manual_seed(len(tokens))
    total, low = sum(tokens), BF16  # every dtype of the cases holds the tokens and the experts exactly
    x, weights, w = torch.randn(total, D, generator=seed), torch.rand(total, K, generator=seed), torch.randn(E, D, D, generator=seed)
    a, b, grad = (torch.randn(shape, generator=seed) for shape in ((E, D, 1), (E, 1, D), (total, D)))
    every = torch.arange(total * K).view(total, K) % len(tokens)
    experts = torch.zeros(total, K, dtype=torch.int64) if case.routing == "all to one" else every * (E // len(tokens))
    return {
        "x": x.to(low).to(case.x), "experts": experts, "weights": weights, "w": w.to(low).float(), "a": a, "b": b, "grad": grad.to(low),
    }  # fmt: skip


def dense(given: dict[str, Tensor], needed: tuple[str, ...]) -> dict[str, Tensor]:
    """All experts over all tokens in float64: y, and the gradients of what needs one."""
    leaves = {name: given[name].double().requires_grad_(name in needed) for name in ("x", "weights", "w", "a", "b")}
    w = leaves["w"] + leaves["a"] @ leaves["b"] if "a" in needed else leaves["w"]
    y = torch.einsum("te,td,edh->th", reference.mix(given["experts"], leaves["weights"], E), leaves["x"], w)
    gradients = torch.autograd.grad(y, [leaves[name] for name in needed], given["grad"].double())
    return {"y": y.detach(), **dict(zip(needed, gradients, strict=True))}


def computed(case: Case, rows: Tensor, plan: mf.Plan, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The usual loop over the local experts."""
    parts, ends = [], plan.offsets.tolist()
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        r = rows[start:end] if case.autocast else rows[start:end].float()
        h = r @ w[i] + r @ a[i] @ b[i] if "a" in case.needed else r @ w[i]
        parts.append(h.to(case.inside) if r.shape[0] or case.always else rows[start:end])
    return torch.cat([*parts, rows[ends[-1] :]])  # with the padding of static mode; of several dtypes it takes the wider one


def layer_here(case: Case, tokens: tuple[int, ...], rank: int, group: Any) -> dict[str, Tensor]:
    given, local, start = problem(case, tokens), E // len(tokens), sum(tokens[:rank])
    own, mine = slice(start, start + tokens[rank]), slice(rank * local, (rank + 1) * local)
    part = {name: given[name][mine if name in ("w", "a", "b") else own].clone() for name in given}
    for name in case.needed:
        part[name].requires_grad_()
    with torch.autocast("cpu", case.inside, enabled=case.autocast):
        plan = mf.plan(part["experts"], part["weights"], E, group, like=part["x"] if case.like else None, max_rows=case.max_rows)
        rows = computed(case, mf.dispatch(part["x"], plan), plan, part["w"], part["a"], part["b"])
        y = mf.combine(rows, plan, dtype=case.asked, wire=case.wires[0], backward_wire=case.wires[1])
    y.backward(part["grad"].to(y.dtype))
    zeros = {name: torch.zeros_like(part[name]) for name in case.needed}
    return {"y": y.detach()} | {name: zeros[name] if part[name].grad is None else part[name].grad for name in case.needed}  # type: ignore[dict-item]


def check(case: Case, tokens: tuple[int, ...], parts: list[dict[str, Tensor]]) -> None:
    wanted = dense(problem(case, tokens), case.needed)
    coarse = 2.0**-4 if any(case.wires) else max(torch.finfo(dtype).eps for dtype in (case.inside, case.result))
    for name, want in wanted.items():
        got = torch.cat([part[name] for part in parts])
        assert {part[name].dtype for part in parts} == {case.result if name == "y" else got.dtype}, case
        assert got.shape == want.shape
        assert (got.double() - want).abs().max() <= 4 * coarse * want.abs().max(), f"{name} of {case}"


TOKENS = (5, 3)
CASES = [
    *(Case(routing, inside=inside, max_rows=c) for routing in ROUTINGS for inside in (BF16, FP16) for c in (None, 5)),
    *(Case(max_rows=c, wires=wires) for c in (None, 5) for wires in (("mxfp8", None), (None, "float8_e4m3"), ("mxfp8", "mxfp8"))),
    *(Case(needed=needed, like=True) for needed in (("x", "w"), ("weights", "w"), ("x", "weights", "w", "a", "b"))),
    # where only the experts are trained: computing without rows as well is the documented way
    *(Case(routing, needed=needed, always=True, max_rows=c) for needed in (("w",), ("a", "b")) for routing in ROUTINGS for c in (None, 5)),
    *(Case(routing, *of, False, like=True, max_rows=c) for of in ((FP32, BF16), (BF16, FP32)) for routing in ROUTINGS for c in (None, 5)),
    *(Case(inside=inside, autocast=False, asked=asked) for inside, asked in ((BF16, FP32), (FP32, BF16), (BF16, FP64))),
]  # fmt: skip


def layers_here(cases: list[Case]) -> list[dict[str, Tensor]]:
    return [layer_here(case, TOKENS, dist.get_rank(), None) for case in cases]


def test_a_layer_is_right_on_every_rank_whatever_dtype_experts_without_rows_give() -> None:
    for case, *parts in zip(CASES, *run_ranks(layers_here, 2, CASES), strict=True):
        check(case, TOKENS, parts)


def test_the_same_holds_without_a_group() -> None:
    for case in CASES:
        check(case, (8,), [layer_here(case._replace(max_rows=case.max_rows and 8), (8,), 0, None)])


SOME = [
    Case(),
    Case("one expert of each rank", max_rows=3),
    Case("one expert of each rank", needed=("a", "b"), always=True),
    Case(x=BF16, inside=FP32, autocast=False, like=True),
]


def in_groups_here() -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Each of some layers over all four ranks, and over pairs of them."""
    mesh, rank = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep")), dist.get_rank()
    return [(layer_here(case, (3, 0, 2, 1), rank, None), layer_here(case, (3, 2), rank % 2, mesh["ep"])) for case in SOME]


def test_gradients_have_the_scale_of_the_dense_layer_on_four_ranks_and_on_pairs_of_them() -> None:
    for case, *ranks in zip(SOME, *run_ranks(in_groups_here, 4), strict=True):
        check(case, (3, 0, 2, 1), [whole for whole, _ in ranks])
        for pair in (0, 2):
            check(case, (3, 2), [part for _, part in ranks[pair : pair + 2]])


def short_here() -> str:
    """Without autocast, like and dtype nothing says what the others give: float32 is expected, bfloat16 comes."""
    plan = mf.plan(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), 2)
    rows = mf.dispatch(torch.full((3, D), 2.0), plan)
    text = ""
    if rows.shape[0]:
        assert torch.equal(mf.combine(rows.bfloat16(), plan), torch.full((3, D), 2.0, dtype=BF16))
    else:
        with pytest.raises(MoECommError) as raised:
            mf.combine(rows, plan)
        text = str(raised.value)
    assert_the_group_still_works()
    return text


def test_a_message_that_is_shorter_than_expected_is_an_error_and_not_garbage() -> None:
    _, text = run_ranks(short_here, 2)
    assert text == (
        "the experts' rows of combine from rank 0 of the group came in a shorter message than this rank's; dtype and width must be the "
        "same on every rank"
    )


@pytest.mark.parametrize(
    ("dtype", "message"), [("half", "dtype was str"), (torch.int32, "dtype was torch.int32"), (torch.float8_e5m2, "dtype")]
)
def test_a_dtype_that_combine_cannot_give_is_named(dtype: Any, message: str) -> None:
    plan = mf.plan(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), 1)
    with pytest.raises(TypeError, match=message):
        mf.combine(torch.ones(3, D), plan, dtype=dtype)


def test_several_tensors_keep_their_dtypes_without_autocast() -> None:
    x = torch.ones(3, D, dtype=BF16)
    plan = mf.plan(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), 1, like=x)
    both = mf.combine((x, x.float()), plan)
    assert [y.dtype for y in both] == [BF16, FP32]
    assert mf.combine(x.float(), plan).dtype == BF16
    assert mf.combine(x.float(), plan, dtype=FP32).dtype == FP32
