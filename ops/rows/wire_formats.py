"""The formats in which rows may travel: a row's D values in 8 bits each, and behind them a scale for each block of them.

The values are E4M3 of the OCP 8-bit Floating Point Specification, revision 1.0: a sign, 4 bits of exponent, 3 of mantissa; up to 448, with
steps of 2^-9 below 2^-6, one NaN and no infinity. It is torch's ``float8_e4m3fn``, and not the ``fnuz`` that some AMD GPUs compute in.

A block's scale s takes its largest value to 448 or just below, so that no finite value is cut off. What arrives of a value v differs from
it by max(2^-4 |v|, 2^-10 s) at most, half a step of 3 bits of mantissa or half of 2^-9, and by what is rounded in float32 and to x's dtype.
A value that is not finite arrives as NaN, and leaves the others of its block alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Wire(NamedTuple):
    """A block is so many values along D, of which the last may be fewer; value = E4M3 * scale."""

    block: int
    scale: torch.dtype


WIRES = {
    "float8_e4m3": Wire(128, torch.float32),  # tiles of 1 x 128, the largest of a block becoming 448: DeepSeek-V3, arXiv:2412.19437, 3.3.2
    "mxfp8": Wire(32, torch.float8_e8m0fnu),  # OCP Microscaling Formats (MX) Specification, version 1.0: the scale is a power of two
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of rows that can travel so

LARGEST = 448.0  # of E4M3
# Below it a block's scale is that of this largest value: nothing is divided by zero, and no scale is too small to be a normal float32. What
# is lost is below 2^-100 * 2^-18.
LEAST = 2.0**-100


def blocks(d: int, wire: str) -> int:
    """How many blocks a row of ``d`` values has."""
    return -(-d // WIRES[wire].block)


def width(d: int, wire: str) -> int:
    """How many bytes a row of ``d`` values takes: the values', then the scales'."""
    return d + blocks(d, wire) * WIRES[wire].scale.itemsize
