"""in_two_chunks: a batch in two halves, so that one half's exchange can run during the other half's experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from moecomm.errors import differ, wrong_value

Tree = TypeVar("Tree")


def in_two_chunks(layer: Callable[..., Tree], *tokens: Tensor) -> Tree:
    """``layer(*tokens)``, computed as ``layer`` of the first half of the tokens and of the second, one after the other.

    Eager mode gains nothing by it: the first half is through before the second starts. Under `torch.compile` with the pass
    `overlap_exchanges` the second half's dispatch is under way while the first one's experts run, and the first one's combine while the
    second one's do; in the backward pass likewise. It costs twice the messages and twice the reads of counts, and experts that run on
    half as many rows at a time: it pays where rows are many and there is nothing else to run during their exchange.

    Args:
        layer: a function of tensors [T, ...], each token by itself, as an MoE layer without capacity is; it gives a tensor
            [T, ...], or a pytree of them. What is no such tensor, such as a loss over the tokens, has no place in it.
        tokens: [T, ...] each, of one T; it may be odd, 1 or 0, and differ from rank to rank: every rank makes two calls.

    Returns what ``layer(*tokens)`` gives, to the rounding of matmuls of other sizes.

    Backward: the layer's own, of each half; the gradient of a parameter is the sum of the two.

    Raises ValueError where the tensors differ in T.

    >>> from moecomm.compile.chunks import in_two_chunks
    >>> in_two_chunks(lambda x, scale: x * scale, torch.arange(3.0), torch.tensor([1.0, 10.0, 100.0]))
    tensor([  0.,  10., 200.])
    """
    length = tokens[0].shape[0]
    for i, each in enumerate(tokens):
        if differ(each.shape[0], length):
            wrong_value(f"tokens[{i}]", f"of shape {list(each.shape)}", f"of shape [{length}, ...], as tokens[0] is")
    half = length // 2
    first = layer(*(each.narrow(0, 0, half) for each in tokens))
    second = layer(*(each.narrow(0, half, length - half) for each in tokens))
    return tree_map(lambda *parts: torch.cat(parts), first, second)
