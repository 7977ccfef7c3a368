"""dequantize: the values of 8-bit rows, against data times scales in float64; eager and compiled."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck

import moecomm.functional as mf
from moecomm.ops.rows.dequantize import apart_triton, dequantize_apart
from moecomm.ops.rows.wire_formats import DTYPES, WIRES, blocks
from tests.spawn import run_ranks

T, E, K = 6, 4, 2


def given(d: int, dtype: torch.dtype = torch.float32, rank: int = 0) -> tuple[Tensor, mf.Plan]:
    seed = torch.Generator().manual_seed(d + rank)
    x = (torch.randn(T, d, generator=seed) * torch.logspace(-3, 3, T).unsqueeze(1)).to(dtype)
    return x.requires_grad_(), mf.plan(torch.randint(0, E, (T, K), generator=seed), torch.ones(T, K), E, like=x)


def by_definition(sent: mf.Quantized, wire: str) -> Tensor:
    """[N, D] float64: each value times the scale of its block."""
    block = torch.arange(sent.data.shape[1]) // WIRES[wire].block
    return sent.data.double() * sent.scales.double()[:, block]


def values_here(dtype: torch.dtype) -> None:
    for wire in WIRES:
        for d in (160, 32, 1, 0):
            x, plan = given(d, dtype, dist.get_rank())
            sent = mf.dispatch_quantized(x, plan, wire)
            rows, want = mf.dequantize(sent), mf.dispatch(x, plan, wire=wire)
            assert torch.equal(rows, want)
            assert torch.equal(rows.detach(), by_definition(sent, wire).float().to(dtype))
            grad = torch.randn(rows.shape, generator=torch.Generator().manual_seed(d)).to(dtype)
            assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (rows, want)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.exhaustive) for dtype in DTYPES[::2])])
def test_its_rows_and_gradients_are_those_of_dispatch_with_a_wire(dtype: torch.dtype) -> None:
    run_ranks(values_here, 2, dtype)


def test_some_of_the_rows_give_some_of_the_values() -> None:
    x, plan = given(40)
    sent = mf.dispatch_quantized(x, plan, "mxfp8")
    some = mf.Quantized(*(part[::2] for part in sent))
    assert torch.equal(mf.dequantize(some), mf.dequantize(sent)[::2])


@pytest.mark.slow
@pytest.mark.parametrize("wire", ["float8_e4m3", pytest.param("mxfp8", marks=pytest.mark.exhaustive)])
def test_inductor_gives_the_eager_bits_where_the_last_block_is_short(wire: str) -> None:
    """torch 2.13 compiles ``scales.repeat_interleave(128, 1)[:, :160]`` wrong on CPUs: code of that kind must not come back."""

    def layer(x: Tensor, plan: mf.Plan) -> Tensor:
        return mf.combine(mf.dequantize(mf.dispatch_quantized(x, plan, wire)) * 2 + 1, plan)

    x, plan = given(160)
    torch._dynamo.reset()
    results = [layer(x, plan), torch.compile(layer, fullgraph=True)(x, plan)]
    assert torch.equal(*results)
    assert torch.equal(*(torch.autograd.grad(y, x, torch.arange(y.numel()).view(y.shape).cos())[0] for y in results))


@pytest.mark.slow
def test_the_op_passes_opcheck_and_its_kernel_gives_the_same_bits() -> None:
    for wire in WIRES:
        for n, d in ((5, 160), (3, 7), (0, 3), (2, 0)):
            data = torch.randint(0, 256, (n, d), dtype=torch.uint8).view(torch.float8_e4m3fn)
            scales = torch.rand(n, blocks(d, wire)).to(WIRES[wire].scale)
            rows = torch.zeros(1, 1).expand(n, d).requires_grad_()
            opcheck(dequantize_apart, (rows, data, scales, wire), test_utils=("test_autograd_registration", "test_faketensor"))
            torch.testing.assert_close(
                apart_triton(rows, data, scales, wire), dequantize_apart(rows, data, scales, wire).detach(), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (None, TypeError, "quantized was NoneType; it must be a Quantized"),
        ({"data": torch.zeros(2, 40)}, TypeError, "quantized.data was of dtype torch.float32; it must be of dtype torch.float8_e4m3fn"),
        ({"scales": torch.zeros(2, 2).double()}, TypeError, "quantized.scales was of dtype torch.float64"),
        ({"scales": torch.zeros(2, 3)}, ValueError, "quantized.scales was of shape [2, 3]; it must be of shape [2, 1], for data of"),
        ({"rows": torch.zeros(2, 3)}, ValueError, "quantized.rows was of shape [2, 3]; it must be of shape [2, 40], as data is"),
        ({"rows": None}, TypeError, "quantized.rows was NoneType; it must be a tensor [N, D]"),
    ],
)
def test_a_wrong_argument_is_named(changed: dict[str, Any] | None, error: type[Exception], message: str) -> None:
    right = mf.Quantized(torch.zeros(2, 40).to(torch.float8_e4m3fn), torch.ones(2, 1), torch.zeros(2, 40))
    with pytest.raises(error, match=re.escape(message)):
        mf.dequantize(None if changed is None else right._replace(**changed))  # type: ignore[arg-type]
