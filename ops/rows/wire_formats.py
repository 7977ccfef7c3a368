"""The 8-bit formats in which rows travel: a row's D values in 8 bits each, then one scale for each block of values.

The values are E4M3 of the OCP 8-bit Floating Point Specification, revision 1.0: one sign bit, 4 exponent bits, 3 mantissa bits.
E4M3 reaches 448, has steps of 2^-9 below 2^-6, one NaN and no infinity. It is torch's ``float8_e4m3fn``, not the ``fnuz`` in which some
AMD GPUs compute.

A block's scale s brings its largest value to 448 or just below, so no finite value is clipped. A value v arrives with an error of at most
max(2^-4 |v|, 2^-10 s), plus the rounding in float32 and to x's dtype. The two terms are half a step of 3 mantissa bits, and half of 2^-9.
A value that is not finite arrives as NaN and does not affect the rest of its block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Wire(NamedTuple):
    """A format: ``block`` is the number of values along D that share a scale; value = E4M3 * scale.

    The last block of a row may be shorter.
    """

    block: int
    scale: torch.dtype


WIRES = {
    "float8_e4m3": Wire(128, torch.float32),  # tiles of 1 x 128, a block's largest value becomes 448: DeepSeek-V3, arXiv:2412.19437, 3.3.2
    "mxfp8": Wire(32, torch.float8_e8m0fnu),  # OCP Microscaling Formats (MX) Specification, version 1.0: the scale is a power of two
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of rows that can travel in 8 bits

LARGEST = 448.0  # of E4M3
# A block whose largest value is smaller gets the scale of LEAST. So nothing is divided by zero, and every scale is a normal float32. The
# loss is below 2^-100 * 2^-18.
LEAST = 2.0**-100


def blocks(d: int, wire: str) -> int:
    """How many blocks a row of ``d`` values has."""
    return -(-d // WIRES[wire].block)


def width(d: int, wire: str) -> int:
    """The bytes of a row of ``d`` values: those of the values, then those of the scales."""
    return d + blocks(d, wire) * WIRES[wire].scale.itemsize
