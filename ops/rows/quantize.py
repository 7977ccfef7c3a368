"""message[s] = x[order[s] // K] in 8 bits: E4M3(x / scale) of its D values, then the scales of its blocks; all zeros for order -1.

Costs one read of S * D elements and one write of S * (D + bytes of scales) bytes. `wire_formats.py` has the formats.
Its mirror is `dequantize`. Neither has a backward: the ops of `dispatch_combine_wire.py` use them and pass the gradient unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from moecomm.ops.base.library import block_of, define, inlined, jit, tl
from moecomm.ops.rows.gather import gather_rows_cpu
from moecomm.ops.rows.wire_formats import LARGEST, LEAST, WIRES, blocks, width

# The elements that the CPU takes at a time, so that they stay in the cache. 2,048 rows of 2,048 bfloat16 take 4.9 ms, and 7.7 ms with the
# way back. All at once they take 22 and 27 ms (one thread of an AMD EPYC; a copy of the rows takes 0.25 ms).
STEP = 2**19
SCHEMA = "quantize(Tensor x, Tensor? order, int k, str wire) -> Tensor"


def quantize_fake(x: Tensor, order: Tensor | None, k: int, wire: str) -> Tensor:
    return x.new_empty((x if order is None else order).shape[0], width(x.shape[1], wire), dtype=torch.uint8)


def quantize_cpu(x: Tensor, order: Tensor | None, k: int, wire: str) -> Tensor:
    t, d = x.shape
    message = x.new_empty(t, width(d, wire), dtype=torch.uint8)  # quantized once per token, however often the token is sent
    if t and d:
        step = max(1, STEP // d)
        for part, into in zip(x.split(step), message.split(step), strict=True):
            _quantize(part, into, wire)
    return message if order is None else gather_rows_cpu(message, order, k)


def _quantize(x: Tensor, message: Tensor, wire: str) -> None:
    d, block = x.shape[1], WIRES[wire].block
    values = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)  # [T, D]
    if d % block:
        values = pad(values, (0, -d % block))
    values = values.unflatten(1, (-1, block))  # [T, blocks, block]
    largest = values.abs().amax(2)  # [T, blocks]
    if not largest.isfinite().all():  # such a value becomes NaN; for the rest of its block it counts as zero
        finite = values.isfinite()
        largest = values.abs().masked_fill_(~finite, 0).amax(2)
        values.masked_fill_(~finite, float("nan"))
    message[:, d:], inverse = _scales(largest, wire)
    message[:, :d] = values.mul_(inverse.unsqueeze(2)).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)[:, :d]


def _scales(largest: Tensor, wire: str) -> tuple[Tensor, Tensor]:
    """Each block's scale in bytes, and the factor for the block's values."""
    if WIRES[wire].scale == torch.float32:
        largest = largest.clamp(min=LEAST)
        return (largest * (1 / LARGEST)).view(torch.uint8), torch.full_like(largest, LARGEST) / largest  # not 448 / x: it rounds twice
    # The smallest power of two that brings the largest value to at most 448 = 1.75 * 2^8. A mantissa above 1.75 carries into the exponent.
    exponent = ((largest.view(torch.int32) + 0x1FFFFF) >> 23).sub_(8).clamp_(min=1)
    return exponent.to(torch.uint8), ((254 - exponent) << 23).view(torch.float32)


@jit(varies=("s",))
def _quantize_kernel(
    x, order, message, s, d, k, count, width, stride_t, stride_d, LARGEST: tl.constexpr, LEAST: tl.constexpr,
    ORDERED: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    col = group[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [GROUP, BLOCK]
    pair = tl.load(order + row, mask=row < s, other=-1) if ORDERED else tl.where(row < s, row * k, -1)
    source = (pair // k).to(tl.int64)
    present = (pair >= 0)[:, None, None]
    place = x + source[:, None, None] * stride_t + col.to(tl.int64)[None, :, :] * stride_d
    values = tl.load(place, mask=present & (col < d)[None, :, :], other=0).to(tl.float32)  # [ROWS, GROUP, BLOCK]
    finite = tl.abs(values) < float("inf")
    largest = tl.max(tl.where(finite, tl.abs(values), 0.0), 2)  # [ROWS, GROUP]
    if SCALE == 4:
        largest = tl.maximum(largest, LEAST)
        scale = (largest * (1 / LARGEST)).to(tl.int32, bitcast=True)
        inverse = tl.div_rn(tl.full([ROWS, GROUP], LARGEST, tl.float32), largest)
    else:
        scale = tl.maximum(((largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8, 1)
        inverse = ((254 - scale) << 23).to(tl.float32, bitcast=True)
    start = message + row.to(tl.int64)[:, None, None] * width
    tl.store(start + col[None, :, :], _e4m3(values * inverse[:, :, None], finite), mask=(row < s)[:, None, None] & (col < d)[None, :, :])
    byte = tl.arange(0, SCALE)
    parts = tl.where(present, scale[:, :, None] >> (8 * byte)[None, None, :], 0).to(tl.uint8)
    behind = d + group[:, None] * SCALE + byte[None, :]
    tl.store(start + behind[None, :, :], parts, mask=(row < s)[:, None, None] & (group < count)[None, :, None])


@inlined
def _e4m3(values, finite):
    """The bits of the nearest E4M3 number, ties to even, for magnitudes up to 448.

    It uses integers, because not every GPU has this format.
    """
    bits = values.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # 3 of 23 mantissa bits; an exponent bias of 7 instead of 127
    small = (tl.abs(values) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # from 2^14 on, the last place of a float32 is 2^-9
    code = tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)  # 2^-6
    return tl.where(finite, code, 0x7F).to(tl.uint8)


def tile(d: int, wire: str) -> tuple[int, int]:
    """The blocks per row and the rows per program: together 2,048 values or fewer."""
    block = WIRES[wire].block
    group = max(1, block_of(d, 1024) // block)
    return group, max(1, 2048 // (group * block))


def quantize_triton(x: Tensor, order: Tensor | None, k: int, wire: str) -> Tensor:
    d = x.shape[1]
    message = quantize_fake(x, order, k, wire)  # [S, W]
    s, count = message.shape[0], blocks(d, wire)
    if s and d:
        group, height = tile(d, wire)
        _quantize_kernel[(-(-s // height), -(-count // group))](
            x, x if order is None else order.contiguous(), message, s, d, k, count, message.shape[1], *x.stride(),
            LARGEST=LARGEST, LEAST=LEAST, ORDERED=order is not None, SCALE=WIRES[wire].scale.itemsize,
            ROWS=height, GROUP=group, BLOCK=WIRES[wire].block,
        )  # fmt: skip
    return message


quantize = define(SCHEMA, quantize_fake, quantize_cpu, quantize_triton)
