"""quantize and dequantize: the nearest 8-bit value of a block's scale, and back, in the bytes that travel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moecomm.ops.rows.dequantize import (
    dequantize,
    dequantize_cpu,
    dequantize_fake,
    dequantize_triton,
    quantized_rows,
    quantized_rows_cpu,
    quantized_rows_fake,
    quantized_rows_triton,
)
from moecomm.ops.rows.quantize import quantize, quantize_cpu, quantize_fake, quantize_triton
from moecomm.ops.rows.wire_formats import LEAST, WIRES, blocks, width
from tests.ops.cases import FLOATS, assert_same_layout, guarded, seeded, strided

TRACED = ("test_schema", "test_autograd_registration", "test_faketensor")  # opcheck's others compare sums, which float8 has none of
K = 2


def e4m3() -> Tensor:
    """[256] float64: the value of each byte, by section 3 of the OCP 8-bit Floating Point Specification."""
    values = []
    for byte in range(256):
        exponent, mantissa = byte >> 3 & 15, byte & 7
        size = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
        values.append(float("nan") if byte & 127 == 127 else -size if byte & 128 else size)
    return torch.tensor(values, dtype=torch.float64)


def taken_apart(message: Tensor, d: int, wire: str) -> tuple[Tensor, Tensor]:
    """The values [S, D], before they are scaled, and the scale of each of them, in float64."""
    data, scales = message[:, :d], message[:, d:].contiguous()
    each = scales.view(torch.float32).double() if wire == "float8_e4m3" else 2.0 ** (scales.double() - 127)
    return e4m3()[data.long()], each.repeat_interleave(WIRES[wire].block, 1)[:, :d]


def largest(x: Tensor, wire: str) -> Tensor:
    """[T, D]: the largest magnitude of each value's block, among those that are finite; in float64."""
    block = WIRES[wire].block
    finite = x.double().masked_fill(~x.isfinite(), 0).abs()
    parts = [part.amax(1, keepdim=True).expand_as(part) for part in finite.split(block, 1)]
    return torch.cat(parts, 1) if parts else finite


def bound(x: Tensor, wire: str) -> Tensor:
    """[T, D] float64: what `dispatch` says of the error before it is rounded to x's dtype, and what float32 rounds on the way."""
    scale = largest(x, wire).clamp(min=LEAST) / 448
    if wire == "mxfp8":
        scale = 2.0 ** scale.log2().ceil().clamp(min=-126)
    return torch.maximum(x.double().abs() * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-20) + x.double().abs() * 2.0**-21


def assert_within_bound(got: Tensor, x: Tensor, wire: str, interpreted: bool = False) -> None:
    got, finite = got.cpu(), x.isfinite()
    assert torch.equal(got.isnan(), ~finite)
    assert not got.isinf().any()
    rounding = (1.0 if interpreted and x.dtype == torch.bfloat16 else 0.5) * torch.finfo(x.dtype).eps
    most = bound(x, wire)
    most = most + (x.double().abs() + most) * rounding + torch.finfo(x.dtype).tiny * torch.finfo(x.dtype).eps
    excess = ((got.double() - x.double()).abs() - most)[finite]
    assert excess.numel() == 0 or excess.max() <= 0, f"{float(excess.max())} more than the bound"


def data(dtype: torch.dtype, d: int) -> Tensor:
    """Rows of very different magnitudes, within a row too, and what is hard: no value, none but one, the largest, the least, not finite."""
    seed = seeded(d)
    x = torch.randn(9, d, generator=seed) * 10.0 ** torch.randint(-3, 4, (9, 1), generator=seed)
    x = x * 2.0 ** -torch.randint(0, 25, x.shape, generator=seed)
    limits = torch.finfo(dtype)
    x[0] = 0
    x[1, 1:] = 0
    x[2, ::2], x[3, ::3] = limits.max, limits.min
    x[4] = limits.tiny * (1 + torch.rand(d, generator=seed))
    x[5] = limits.tiny * (
        1 if dtype == torch.bfloat16 else limits.eps
    )  # the least of all; Triton's interpreter takes 0 for a bfloat16 like it
    x[6, ::40], x[6, 7::50], x[6, 9::60] = float("nan"), float("inf"), float("-inf")
    x[7] = float("inf")
    return x.to(dtype)


def orders(tokens: int) -> tuple[Tensor, Tensor]:
    """Rows of tokens in no order, with padding, and padding alone."""
    some = torch.randint(-K, tokens * K, (11,), generator=seeded(tokens), dtype=torch.int32).clamp(min=-1) if tokens else torch.zeros(0)
    return some.to(torch.int32), torch.full((3,), -1, dtype=torch.int32)


def quantized(x: Tensor, order: Tensor | None, wire: str, device: str) -> Tensor:
    """By the kernel and by the CPU path, which give the same bytes."""
    want = quantize_cpu(x, order, K, wire)
    got = guarded(quantize_triton, x.to(device), None if order is None else order.to(device), K, wire)
    assert torch.equal(got.cpu(), want)
    assert_same_layout(quantize_fake(x, order, K, wire), want)
    return want


def dequantized(message: Tensor, order: Tensor | None, d: int, dtype: torch.dtype, wire: str, device: str) -> tuple[Tensor, Tensor]:
    """By the CPU path, and by the kernel."""
    want = dequantize_cpu(message, order, K, d, dtype, wire)
    with np.errstate(over="ignore"):  # Triton's interpreter is numpy, that says so; what overflows is cut off
        got = guarded(dequantize_triton, message.to(device), None if order is None else order.to(device), K, d, dtype, wire)
    assert_same_layout(dequantize_fake(message, order, K, d, dtype, wire), want)
    if not (device == "cpu" and dtype == torch.bfloat16):  # the interpreter cuts a float32 off where a GPU rounds it
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)
    return want, got


@pytest.mark.parametrize("wire", WIRES)
def test_every_value_becomes_the_nearest_of_8_bits_and_ties_go_to_the_even_one(wire: str, device: str) -> None:
    table = e4m3()[:127].float()  # 0 to 448
    ties = (table[1:] + table[:-1]) / 2
    values = torch.cat((table, ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1)))
    want = torch.cat((torch.arange(127), (torch.arange(126) + 1) // 2 * 2, torch.arange(1, 127), torch.arange(126)))
    block = WIRES[wire].block
    for sign in (1, -1):
        x = torch.nn.functional.pad(sign * values, (0, -len(values) % (block - 1))).view(-1, block - 1)
        x = torch.cat((x, torch.full((x.shape[0], 1), 448.0)), 1)  # so that every scale is 1
        got = quantized(x, None, wire, device)[:, : block - 1].flatten()[: len(values)]
        assert torch.equal(got.long(), want + 128 * (sign < 0))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_byte_is_read_as_the_specification_says(dtype: torch.dtype, wire: str, device: str) -> None:
    block, d = WIRES[wire].block, 256
    for exponent in (-10, 0, 7, 40):
        scales = torch.full((1, d // block), 2.0**exponent)
        code = scales.view(torch.uint8) if wire == "float8_e4m3" else (scales.log2() + 127).to(torch.uint8)
        message = torch.cat((torch.arange(256, dtype=torch.uint8).view(1, d), code), 1)
        most = torch.finfo(dtype).max
        want = (e4m3() * 2.0**exponent).clamp(-most, most).to(dtype).view(1, d)
        for got in dequantized(message, None, d, dtype, wire, device):
            assert torch.equal(got.cpu().isnan(), want.isnan())
            assert torch.equal(got.cpu().nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("d", [1, 5, 100, 256, 1300])
def test_a_value_comes_back_within_the_bound_and_what_is_not_finite_as_nan(dtype: torch.dtype, d: int, wire: str, device: str) -> None:
    x = data(dtype, d)
    message = quantized(x, None, wire, device)
    values, scales = taken_apart(message, d, wire)
    assert torch.equal(values.isnan(), ~x.isfinite())
    if wire == "mxfp8":  # the least power of two that cuts nothing off; every step is exact
        least = 2.0 ** (largest(x, wire) / 448).log2().ceil().clamp(min=-126)
        assert torch.equal(scales, least)
        assert ((values * scales - x.double()).abs()[x.isfinite()] <= bound(x, wire)[x.isfinite()]).all()
    else:
        torch.testing.assert_close(scales, largest(x, wire).clamp(min=LEAST) / 448, rtol=2.0**-23, atol=0)
    for got, interpreted in zip(dequantized(message, None, d, dtype, wire, device), (False, device == "cpu"), strict=True):
        assert_within_bound(got, x, wire, interpreted)
        assert not got[0].any()


@pytest.mark.slow
@pytest.mark.parametrize("wire", WIRES)
def test_rows_are_gathered_on_the_way_and_padding_is_zeros(wire: str, device: str) -> None:
    for tokens, d in ((9, 33), (9, 128), (70, 5), (0, 5), (3, 0), (0, 0)):
        x = torch.randn(tokens, d, generator=seeded(d))
        whole = quantized(x, None, wire, device)
        assert whole.shape[1] == width(d, wire) == d + blocks(d, wire) * (4 if wire == "float8_e4m3" else 1)
        rows, _ = dequantized(whole, None, d, x.dtype, wire, device)
        for order in orders(tokens):
            source = torch.where(order < 0, tokens, order // K).long()
            want = torch.cat((whole, whole.new_zeros(1, whole.shape[1])))[source]
            assert torch.equal(quantized(x, order, wire, device), want)
            got, _ = dequantized(whole, order, d, x.dtype, wire, device)
            assert torch.equal(got, torch.cat((rows, rows.new_zeros(1, d)))[source])
            assert not dequantized(want, None, d, x.dtype, wire, device)[0][order < 0].any()
            apart = guarded(quantized_rows_triton, whole.to(device), order.to(device), K, d, wire)
            for values, scales in (quantized_rows_cpu(whole, order, K, d, wire), apart):
                assert torch.equal(torch.cat((values.view(torch.uint8), scales.view(torch.uint8)), 1).cpu(), want)
                assert_same_layout(quantized_rows_fake(whole, order, K, d, wire), (values, scales))


@pytest.mark.parametrize("wire", WIRES)
def test_strides_do_not_matter(wire: str, device: str) -> None:
    for dtype in FLOATS:
        x = torch.randn(6, 200, generator=seeded(0)).to(dtype)
        want = quantize_cpu(x, None, 1, wire)
        for layout in (*strided(x), x[:1].expand(6, 200)):
            before = layout.clone()
            got = quantized(layout, None, wire, device)
            assert torch.equal(got, want) or layout.stride(0) == 0
            assert torch.equal(layout, before)


@pytest.mark.slow
def test_the_ops_pass_opcheck(device: str) -> None:
    for wire in WIRES:
        for tokens, d in ((5, 40), (0, 3), (2, 0), (1, 1)):
            x = torch.randn(tokens, d, generator=seeded(d)).to(device)
            message, some, padding = quantize(x, None, 1, wire), *(order.to(device) for order in orders(tokens))
            for order in (None, some, padding):
                opcheck(quantize, (x, order, K, wire))
                opcheck(dequantize, (message, order, K, d, torch.bfloat16, wire))
            opcheck(quantized_rows, (message, some, K, d, wire), test_utils=TRACED)
