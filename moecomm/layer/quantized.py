"""Quantized and dequantize: rows in 8 bits, as they arrive, and their values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moecomm.errors import check_tensor, differ, wrong_type, wrong_value
from moecomm.ops.rows import dequantize as ops
from moecomm.ops.rows.wire_formats import DTYPES, WIRES, blocks

FORMATS = {wire.scale: name for name, wire in WIRES.items()}  # the name of each format by the dtype of its scales


class Quantized(NamedTuple):
    """The result of `dispatch_quantized`: 8-bit rows and their scales. `dequantize` turns them into values.

    Value d of row n is data[n, d] * scales[n, d // 128]; with wire "mxfp8" it is data[n, d] * scales[n, d // 32].

    Example:
        >>> a_plan = plan(torch.tensor([[0]]), torch.ones(1, 1), num_experts=1)
        >>> data, scales, _ = dispatch_quantized(torch.tensor([[7.0, 0.5]]), a_plan, "mxfp8")
        >>> data.float(), scales.float()
        (tensor([[448.,  32.]]), tensor([[0.0156]]))
    """

    data: Tensor  # [N, D] float8_e4m3fn
    scales: Tensor  # [N, ceil(D / 128)] float32, or with wire "mxfp8" [N, ceil(D / 32)] float8_e8m0fnu
    rows: Tensor  # [N, D] of x's dtype, without values or memory: it receives the gradient of the rows


def dequantize(quantized: Quantized) -> Tensor:
    """Return the values of 8-bit rows: ``dequantize(dispatch_quantized(x, plan, wire))`` is ``dispatch(x, plan, wire=wire)``, bit by bit.

    Args:
        quantized: the result of `dispatch_quantized`, or one like it, such as some of its rows. The dtype of ``scales`` tells
            the format: float32 is "float8_e4m3", float8_e8m0fnu is "mxfp8".

    Returns:
        [N, D] of the dtype of ``quantized.rows``, which is that of x: each value times its block's scale, in float32, rounded
        once. A value beyond the dtype becomes its largest number; NaN stays NaN.

    Raises:
        TypeError: ``quantized`` is not a `Quantized`, or a field of it has another dtype than `dispatch_quantized` returns.
        ValueError: the shapes of the fields do not fit each other.

    Example:
        >>> a_plan = plan(torch.tensor([[0], [0]]), torch.ones(2, 1), num_experts=1)
        >>> x = torch.tensor([[7.0, 0.5], [1.0, 0.3]], requires_grad=True)
        >>> rows = dequantize(dispatch_quantized(x, a_plan, "mxfp8"))
        >>> rows.sum().backward()
        >>> rows.tolist(), x.grad.tolist()
        ([[7.0, 0.5], [1.0, 0.3125]], [[1.0, 1.0], [1.0, 1.0]])

    Backward: ``quantized.rows`` gets the gradient unchanged; ``data`` and ``scales`` get none.

    Cost: sends nothing.
    """
    if not isinstance(quantized, Quantized):
        wrong_type("quantized", type(quantized).__name__, "a Quantized, as moecomm.functional.dispatch_quantized gives it")
    data, scales, rows = quantized
    fields = (
        ("data", data, "[N, D]", (torch.float8_e4m3fn,)),
        ("scales", scales, "[N, blocks of D]", tuple(FORMATS)),
        ("rows", rows, "[N, D]", DTYPES),
    )
    for field, value, shape, dtypes in fields:
        check_tensor(f"quantized.{field}", value, shape, dims=2)
        if value.dtype not in dtypes:
            wrong_type(f"quantized.{field}", f"of dtype {value.dtype}", f"of dtype {' or '.join(map(str, dtypes))}")
    wire = FORMATS[scales.dtype]
    n, d = data.shape
    if differ(rows.shape[0], n) or differ(rows.shape[1], d):
        wrong_value("quantized.rows", f"of shape {list(rows.shape)}", f"of shape {[n, d]}, as data is")
    if differ(scales.shape[0], n) or differ(scales.shape[1], blocks(d, wire)):
        wrong_value("quantized.scales", f"of shape {list(scales.shape)}", f"of shape {[n, blocks(d, wire)]}, for data of shape {[n, d]}")
    return ops.dequantize_apart(rows, data, scales, wire)
