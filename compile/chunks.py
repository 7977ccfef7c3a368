"""in_two_chunks: run a layer on two halves of a batch, so that one half's exchange overlaps with the other half's experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from moecomm.errors import differ, wrong_value

Tree = TypeVar("Tree")


def in_two_chunks(layer: Callable[..., Tree], *tokens: Tensor) -> Tree:
    """Return ``layer(*tokens)``, computed by two calls: on the first half of the tokens, then on the second half.

    Args:
        layer: a function of tensors [T, ...] that treats each token by itself, such as an MoE layer
            without capacity. It returns a tensor [T, ...] or a pytree of them. It must not return
            anything else, such as a loss over the tokens.
        tokens: [T, ...] each, with the same T. T may be odd, 1 or 0, and may differ between ranks:
            every rank makes two calls.

    Returns:
        What ``layer(*tokens)`` returns, up to the rounding of matmuls of other sizes.

    Raises:
        ValueError: the tensors differ in T.

    Backward: that of the layer, for each half. The gradient of a parameter is the sum of the two.

    >>> from moecomm.compile.chunks import in_two_chunks
    >>> in_two_chunks(lambda x, scale: x * scale, torch.arange(3.0), torch.tensor([1.0, 10.0, 100.0]))
    tensor([  0.,  10., 200.])

    Under `torch.compile` with the pass `overlap_exchanges`, the second half's dispatch runs during
    the first half's experts, and the first half's combine during the second half's experts. The
    backward pass overlaps in the same way. In eager mode there is no gain: the first half ends
    before the second half starts.

    Costs twice the messages and twice the reads of counts, and experts run on half as many rows at
    a time. It pays off with many rows and without other work that can run during their exchange.
    """
    length = tokens[0].shape[0]
    for i, each in enumerate(tokens):
        if differ(each.shape[0], length):
            wrong_value(f"tokens[{i}]", f"of shape {list(each.shape)}", f"of shape [{length}, ...], as tokens[0] is")
    half = length // 2
    first = layer(*(each.narrow(0, 0, half) for each in tokens))
    second = layer(*(each.narrow(0, half, length - half) for each in tokens))
    return tree_map(lambda *parts: torch.cat(parts), first, second)
