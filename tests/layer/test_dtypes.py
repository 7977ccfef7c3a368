"""Every dtype of torch in every function that sends: right, forward and backward, or refused by name before anything is sent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moecomm.functional as mf
from moecomm.errors import MOVED, SUMMED
from moecomm.ops.base.signature import DTYPES
from moecomm.ops.rows.gather import gather_triton
from moecomm.ops.rows.rank_sum import rank_sum_triton
from moecomm.ops.rows.weighted_sum import weighted_sum_triton
from moecomm.ops.rows.weighted_sum_backward import backward_triton
from tests.faults.test_bad_input import REFUSAL
from tests.ops.cases import assert_within_rounding, seeded
from tests.spawn import run_ranks
from tests.traffic import Traffic

EXPERTS = torch.tensor([[0, 1], [1, 0], [1, -1]])  # of each rank's three tokens
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)


def values(dtype: torch.dtype, rows: int, rank: int) -> Tensor:
    """[rows, 4]: small integers where torch can make them, else bytes."""
    numbers = torch.randint(0, 4, (rows, 4), generator=seeded(rank))
    if dtype in SUMMED + COMPLEX or dtype == torch.bool:
        return numbers.to(dtype)
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 100, (rows, 4 * size), generator=seeded(rank), dtype=torch.uint8).view(dtype)


class Use(NamedTuple):
    """What a function gives of x, from the x of both ranks, and what it takes."""

    call: Callable[[Tensor], Tensor]
    want: Callable[[Tensor, Tensor, int], Tensor]
    factor: Any = 1  # the gradient of x where that of every element of the result is 1
    sums: bool = False  # it computes with x
    sums_gradient: tuple[torch.dtype, ...] | None = None  # the dtypes of gradients that it adds up, if it does
    rows: tuple[int, int] = (3, 3)  # of each rank's x
    argument: str = "x"


def synced(x: Tensor) -> Tensor:
    copy = x.view(torch.uint8).clone().view(x.dtype)
    mf.sync_params_([copy], None)
    return copy


def uses() -> dict[str, Use]:
    plan = mf.plan(EXPERTS, torch.ones(3, 2), 2)
    tokens = [[0, 1], [0, 1, 2]][dist.get_rank()]  # of each rank, for this rank's expert

    def combined(a: Tensor, b: Tensor, rank: int) -> Tensor:
        """This rank's tokens have two rows at rank 0, and three at rank 1."""
        a, b = a[2 * rank : 2 * rank + 2], b[3 * rank : 3 * rank + 3]
        return torch.stack((a[0] + b[0], a[1] + b[1], b[2]))

    return {
        "dispatch": Use(
            lambda x: mf.dispatch(x, plan),
            lambda a, b, _: torch.cat((a[tokens], b[tokens])),
            torch.tensor([[2], [2], [1]]),
            sums_gradient=SUMMED + COMPLEX,
        ),
        "combine": Use(lambda x: mf.combine(x, plan), combined, sums=True, rows=(4, 6), argument="rows"),
        "slice_scatter": Use(lambda x: mf.slice_scatter(x, None), lambda a, b, rank: (a, b)[rank].chunk(2)[rank]),
        "slice_gather": Use(lambda x: mf.slice_gather(x, None, size=5), lambda a, b, _: torch.cat((a, b)), rows=(3, 2)),
        "slice_gather of parts": Use(
            lambda x: mf.slice_gather(x, None, grad="reduce"), lambda a, b, _: torch.cat((a, b)), 2, sums_gradient=SUMMED
        ),
        "slice_reduce": Use(lambda x: mf.slice_reduce(x, None), lambda a, b, rank: (a + b).chunk(2)[rank], sums=True),
        "sum_ranks": Use(lambda x: mf.sum_ranks(x, None), lambda a, b, _: a + b, sums=True),
        "sum_gradient": Use(lambda x: mf.sum_gradient(x, None), lambda a, b, rank: (a, b)[rank], 2, sums=True),
        "sync_params": Use(lambda x: mf.sync_params(x, None), lambda a, b, _: a, sums_gradient=SUMMED + COMPLEX, argument="params' leaf 0"),
        "sync_params without sums": Use(lambda x: mf.sync_params(x, None, grad=None), lambda a, b, _: a, argument="params"),
        "sync_params_": Use(synced, lambda a, b, _: a, argument="params"),
    }


def is_refused(use: Use, dtype: torch.dtype, x: Tensor) -> bool:
    """What the docstrings say."""
    if use.sums:
        return dtype not in SUMMED
    return dtype not in MOVED or (use.sums_gradient is not None and x.requires_grad and dtype not in use.sums_gradient)


def same(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.detach().view(torch.uint8), want.view(torch.uint8))


def use_here(name: str, use: Use, dtype: torch.dtype, needed: bool) -> None:
    rank = dist.get_rank()
    parts = [values(dtype, rows, p) for p, rows in enumerate(use.rows)]
    x = parts[rank]
    if needed:
        if not (dtype.is_floating_point or dtype.is_complex) or dtype == torch.float4_e2m1fn_x2:  # torch cannot make the gradient
            return
        x = x.clone().requires_grad_()
    y, refusal = x, ""
    with Traffic() as traffic:
        try:
            y = use.call(x)
        except TypeError as error:
            refusal = str(error)
    assert bool(refusal) == is_refused(use, dtype, x), f"{name} of {dtype}: {refusal}"
    if refusal:
        assert refusal.startswith((f"{use.argument} was of dtype {dtype}", f"params was of dtype {dtype}")), refusal
        assert traffic.bytes == (REFUSAL if name == "sync_params_" else [])
        return
    assert y.dtype == dtype
    known = parts if dtype in SUMMED else [part.view(torch.uint8) for part in parts]
    assert same(y, use.want(known[0], known[1], rank)), f"{name} of {dtype}"
    if needed and y.requires_grad:
        (grad,) = torch.autograd.grad(y, x, torch.ones(y.shape).to(dtype))
        assert same(grad, (torch.ones(x.shape) * use.factor).to(dtype)), f"the gradient of {name} of {dtype}"


def mean_of_gradients_here(dtype: torch.dtype) -> None:
    param = torch.zeros(3, 4).to(dtype).requires_grad_()
    param.grad = (torch.ones(3, 4) * 2 * dist.get_rank()).to(dtype)
    if dtype in SUMMED + COMPLEX:
        mf.sync_grads_([param], None)
        assert same(param.grad, torch.ones(3, 4).to(dtype))
    else:
        with pytest.raises(TypeError, match="params was a tensor with a gradient of dtype"):
            mf.sync_grads_([param], None)


def every_dtype_here() -> None:
    warnings.simplefilter("ignore")  # of complex32, and of quantized dtypes
    for name, use in uses().items():
        for dtype in DTYPES:
            for needed in (False, True):
                use_here(name, use, dtype, needed)
    for dtype in DTYPES:
        if dtype in MOVED and (dtype.is_floating_point or dtype.is_complex) and dtype != torch.float4_e2m1fn_x2:
            mean_of_gradients_here(dtype)


@pytest.mark.slow
def test_every_dtype_is_right_or_refused_by_name_before_anything_is_sent() -> None:
    run_ranks(every_dtype_here, 2)


@pytest.mark.slow
def test_the_kernels_move_every_dtype_and_add_up_those_that_are_summed() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    order, position = (torch.tensor(ids, dtype=torch.int32, device=device) for ids in ([4, 0, -1, 2, 3], [[1, -1], [3, 4], [0, -1]]))
    warnings.simplefilter("ignore")  # of complex32
    for dtype in MOVED:
        x = values(dtype, 3, 0)
        got = gather_triton(x.to(device), order, position).cpu().view(torch.uint8)
        moved = x.view(torch.uint8)
        assert torch.equal(got, torch.stack((moved[2], moved[0], torch.zeros_like(moved[0]), moved[1], moved[1]))), dtype
    for dtype in SUMMED:
        rows, weights = values(dtype, 5, 1), torch.rand(3, 2, generator=seeded(2))
        grad = values(dtype, 3, 3)
        given = [each.to(device) for each in (rows, weights)]
        y = weighted_sum_triton(*given, order, position).cpu()
        exact, factors = rows.double(), weights.double()
        want = torch.stack((factors[0, 0] * exact[1], factors[1, 0] * exact[3] + factors[1, 1] * exact[4], factors[2, 0] * exact[0]))
        assert_within_rounding(y, want, want.abs(), 2.0**-23, interpreted=device == "cpu")
        grad_rows, grad_weights = (each.cpu() for each in backward_triton(grad.to(device), *given, order, position))
        slots = torch.stack(
            (factors[2, 0] * grad[2], factors[0, 0] * grad[0], exact[0] * 0, factors[1, 0] * grad[1], factors[1, 1] * grad[1])
        )
        assert_within_rounding(grad_rows, slots, slots.abs(), 2.0**-23, interpreted=device == "cpu")
        dots = [(2, 0, 0), (0, 0, 1), (1, 0, 3), (1, 1, 4)]
        for m, j, n in dots:
            assert float(grad_weights[m, j]) == float(grad[m].double() @ exact[n])
        assert torch.equal(rank_sum_triton(rows.to(device), 1, False).cpu(), exact.sum(0).to(dtype))


@pytest.mark.parametrize("make", [mf.sync_params_, mf.sync_grads_, lambda params, group: mf.sync_params(list(params.parameters()), group)])
def test_a_module_on_the_meta_device_is_refused_by_name(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="params was on the meta device; it must be on a device that holds its values"):
        make(torch.nn.Linear(2, 2, device="meta"), None)


def test_weights_and_rows_of_float8_are_refused_by_name() -> None:
    plan = mf.plan(EXPERTS, torch.ones(3, 2), 2)
    must = "it must be of dtype float64, float32, bfloat16 or float16, to compute with"
    with pytest.raises(TypeError, match=f"weights was of dtype torch.float8_e4m3fn; {must}"):
        mf.plan(EXPERTS, torch.ones(3, 2).to(torch.float8_e4m3fn), 2)
    for like in (None, torch.ones(3, 4)):
        with pytest.raises(TypeError, match=f"rows was of dtype torch.float8_e5m2; {must}"):
            mf.combine(
                torch.ones(5, 4).to(torch.float8_e5m2), mf.plan(EXPERTS, torch.ones(3, 2), 2, like=like) if like is not None else plan
            )


def test_complex_tokens_have_the_gradient_of_their_parts() -> None:
    plan = mf.plan(EXPERTS, torch.ones(3, 2), 2)
    x = torch.randn(3, 4, dtype=torch.complex64, generator=seeded(0))
    for tokens in (x, x.conj(), x[:, 0], x.t().contiguous().t()):
        leaf = tokens.detach().requires_grad_()
        rows = mf.dispatch(leaf, plan)
        assert torch.equal(rows, tokens[[0, 1, 0, 1, 2]])
        grad = torch.randn(rows.shape, dtype=torch.complex64, generator=seeded(1))
        (got,) = torch.autograd.grad(rows, leaf, grad)
        torch.testing.assert_close(got, torch.stack((grad[0] + grad[2], grad[1] + grad[3], grad[4])))
    none = torch.empty(0, 4, dtype=torch.complex128, requires_grad=True)
    rows = mf.dispatch(none, mf.plan(EXPERTS[:0], torch.ones(0, 2), 2))
    assert torch.autograd.grad(rows, none, rows)[0].shape == rows.shape == none.shape
