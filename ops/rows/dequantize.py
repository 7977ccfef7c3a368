"""rows[n] = E4M3 * scale of message[order[n] // K], in a given dtype or as separate values and scales; zeros where order[n] is -1.

Costs one read of N * (D + bytes of scales) bytes and one write of N * D elements. `wire_formats.py` has the formats.
Its mirror is `quantize`. Neither has a backward: the ops of `dispatch_combine_wire.py` use them and pass the gradient unchanged.
`dequantize_apart` takes back the values and scales that `quantized_rows` gave. It copies them into one message first. Its ``rows`` have
no values: their gradient is that of the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moecomm.ops.base.library import define, differentiable, inlined, jit, tl
from moecomm.ops.rows.gather import gather_rows_cpu, gather_rows_triton
from moecomm.ops.rows.quantize import STEP, tile
from moecomm.ops.rows.wire_formats import WIRES, blocks

SCHEMA = "dequantize(Tensor message, Tensor? order, int k, SymInt d, ScalarType dtype, str wire) -> Tensor"
APART = "quantized_rows(Tensor message, Tensor order, int k, SymInt d, str wire) -> (Tensor, Tensor)"

TOGETHER = "dequantize_apart(Tensor rows, Tensor data, Tensor scales, str wire) -> Tensor"


def dequantize_fake(message: Tensor, order: Tensor | None, k: int, d: int, dtype: torch.dtype, wire: str) -> Tensor:
    return message.new_empty((message if order is None else order).shape[0], d, dtype=dtype)


def dequantize_cpu(message: Tensor, order: Tensor | None, k: int, d: int, dtype: torch.dtype, wire: str) -> Tensor:
    rows = message.new_empty(message.shape[0], d, dtype=dtype)
    if rows.numel():
        step = max(1, STEP // d)
        for part, into in zip(message.split(step), rows.split(step), strict=True):
            _dequantize(part, into, wire)
    return rows if order is None else gather_rows_cpu(rows, order, k)


def _dequantize(message: Tensor, rows: Tensor, wire: str) -> None:
    d, block = rows.shape[1], WIRES[wire].block
    data, scales = message[:, :d], message[:, d:].clone(memory_format=torch.contiguous_format)  # copied: aligned for float32
    if d % block:
        data = pad(data, (0, -d % block))
    # torch 2.13 reads this format slowly. Shifted by 7 bits, exponent and mantissa are those of a float16, up to a factor of 2^8.
    halves = data.view(torch.int8).to(torch.int16, memory_format=torch.contiguous_format)
    halves = halves.bitwise_left_shift_(7).bitwise_and_(-0x4001)  # the sign is in bits 14 and 15; clear bit 14
    values = halves.view(torch.float16).to(torch.float32)
    sizes = data & 0x7F
    if sizes.max() == 0x7F:
        values.masked_fill_(sizes == 0x7F, float("nan"))
    factors = scales.view(torch.float32) if WIRES[wire].scale == torch.float32 else (scales.to(torch.int32) << 23).view(torch.float32)
    values = values.unflatten(1, (-1, block)).mul_(factors.unsqueeze(2)).mul_(2.0**8).flatten(1)
    most = torch.finfo(rows.dtype).max
    rows.copy_(values[:, :d].clamp_(-most, most))  # rounding up may have passed the largest number


@jit(varies=("n",))
def _dequantize_kernel(
    message, order, rows, n, d, k, count, width,
    MOST: tl.constexpr, ORDERED: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    col = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [GROUP, BLOCK]
    pair = tl.load(order + row, mask=row < n, other=-1) if ORDERED else tl.where(row < n, row * k, -1)
    present = (pair >= 0)[:, None, None]
    start = message + (pair // k).to(tl.int64)[:, None, None] * width
    values = _from_e4m3(tl.load(start + col[None, :, :], mask=present & (col < d)[None, :, :], other=0))  # [ROWS, GROUP, BLOCK]
    byte = tl.arange(0, SCALE)
    behind = d + group[:, None] * SCALE + byte[None, :]
    parts = tl.load(start + behind[None, :, :], mask=present & (group < count)[None, :, None], other=0).to(tl.int32)
    bits = tl.sum(parts << (8 * byte)[None, None, :], 2)  # [ROWS, GROUP]
    scale = (bits if SCALE == 4 else bits << 23).to(tl.float32, bitcast=True)
    values = values * scale[:, :, None]
    values = tl.where(values > MOST, MOST, tl.where(values < -MOST, -MOST, values))  # rounding up may have passed MOST; NaN stays NaN
    inside = (row < n)[:, None, None] & (col < d)[None, :, :]
    tl.store(rows + row.to(tl.int64)[:, None, None] * d + col[None, :, :], values.to(rows.dtype.element_ty), mask=inside)


@inlined
def _from_e4m3(byte):
    """The value of an E4M3 number from its bits. It uses integers, because not every GPU has this format."""
    size = byte.to(tl.int32) & 0x7F
    normal = ((size + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)  # 2^-9
    value = tl.where(size == 0x7F, float("nan"), value)
    return tl.where(byte >= 0x80, -value, value)


def dequantize_triton(message: Tensor, order: Tensor | None, k: int, d: int, dtype: torch.dtype, wire: str) -> Tensor:
    rows = dequantize_fake(message, order, k, d, dtype, wire)  # [N, D]
    n, count = rows.shape[0], blocks(d, wire)
    if n and d:
        group, height = tile(d, wire)
        _dequantize_kernel[(-(-n // height), -(-count // group))](
            message, message if order is None else order.contiguous(), rows, n, d, k, count, message.shape[1],
            MOST=torch.finfo(dtype).max, ORDERED=order is not None, SCALE=WIRES[wire].scale.itemsize,
            ROWS=height, GROUP=group, BLOCK=WIRES[wire].block,
        )  # fmt: skip
    return rows


def quantized_rows_fake(message: Tensor, order: Tensor, k: int, d: int, wire: str) -> tuple[Tensor, Tensor]:
    data = message.new_empty(order.shape[0], d, dtype=torch.float8_e4m3fn)
    return data, message.new_empty(order.shape[0], blocks(d, wire), dtype=WIRES[wire].scale)


def quantized_rows_cpu(message: Tensor, order: Tensor, k: int, d: int, wire: str) -> tuple[Tensor, Tensor]:
    return _as_floats(gather_rows_cpu(message[:, :d], order, k), gather_rows_cpu(message[:, d:], order, k), wire)


def quantized_rows_triton(message: Tensor, order: Tensor, k: int, d: int, wire: str) -> tuple[Tensor, Tensor]:
    return _as_floats(gather_rows_triton(message[:, :d], order, k), gather_rows_triton(message[:, d:], order, k), wire)


def _as_floats(data: Tensor, scales: Tensor, wire: str) -> tuple[Tensor, Tensor]:
    dtype = WIRES[wire].scale
    return data.view(torch.float8_e4m3fn), scales.view(dtype) if scales.shape[1] else scales.new_empty(scales.shape, dtype=dtype)


def apart_fake(rows: Tensor, data: Tensor, scales: Tensor, wire: str) -> Tensor:
    return rows.new_empty(rows.shape)


def _message(data: Tensor, scales: Tensor) -> Tensor:
    return torch.cat((data.view(torch.uint8), scales.contiguous().view(torch.uint8)), 1)  # [N, W]


def apart_cpu(rows: Tensor, data: Tensor, scales: Tensor, wire: str) -> Tensor:
    return dequantize_cpu(_message(data, scales), None, 1, data.shape[1], rows.dtype, wire)


def apart_triton(rows: Tensor, data: Tensor, scales: Tensor, wire: str) -> Tensor:
    return dequantize_triton(_message(data, scales), None, 1, data.shape[1], rows.dtype, wire)


def apart_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass  # the gradient passes unchanged


def apart_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None, None, None


dequantize = define(SCHEMA, dequantize_fake, dequantize_cpu, dequantize_triton)
quantized_rows = define(APART, quantized_rows_fake, quantized_rows_cpu, quantized_rows_triton)
dequantize_apart = define(TOGETHER, apart_fake, apart_cpu, apart_triton)
differentiable(dequantize_apart, apart_save, apart_backward)
