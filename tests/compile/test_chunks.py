"""A batch in two chunks: the same result, and one chunk's exchange under way while the other one's experts run."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from moecomm.compile.chunks import in_two_chunks
from moecomm.compile.overlap import overlap_exchanges
from moecomm.compile.passes import options
from tests.compile.graphs import unbacked
from tests.compile.test_layer import layer, parameters, step, tokens_here
from tests.compile.test_overlap import order_of_code
from tests.spawn import run_ranks


def chunked(x: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return in_two_chunks(lambda *tokens: layer(*tokens, up, down), x, experts, weights)


def test_tokens_must_be_as_many_in_each_tensor() -> None:
    with pytest.raises(ValueError, match=r"tokens\[1\] was of shape \[4, 2\]; it must be of shape \[5, "):
        in_two_chunks(torch.add, torch.ones(5, 2), torch.ones(4, 2))


def compare_here(function: Any) -> None:
    """Chunks beside the whole batch, whatever T."""
    experts = parameters(torch.float32)
    for seed, tokens in enumerate(((5, 8), (0, 3), (1, 0), (1, 1), (0, 0), (7, 2))):
        given = tokens_here(seed, tokens[dist.get_rank()], torch.float32, "random")
        unbacked(*given)
        for one, right in zip(step(function, given, experts), step(layer, given, experts), strict=True):
            torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5)


def test_chunks_give_what_the_whole_batch_does() -> None:
    run_ranks(compare_here, 2, chunked)


def orders_here() -> list[list[str]]:
    """The order of the compiled code."""
    compiled = torch.compile(chunked, fullgraph=True, options=options(overlap_exchanges))
    _, codes = run_and_get_code(compare_here, compiled)
    return [order_of_code(code) for code in codes]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_compiled_each_chunk_exchanges_while_the_other_computes() -> None:
    orders, other = run_ranks(orders_here, 2, timeout=300)
    assert orders == other
    assert len(orders) == 2  # a forward and a backward: another T compiles nothing anew
    expecttest.assert_expected_inline(
        "\n".join(orders[0]),
        """\
count
counting_sort
few_slots
messages_exchange
count
counting_sort
few_slots
messages_exchange
wait messages_exchange
plan_sizes
first
slots_exchange
dispatch_exchange
wait messages_exchange
plan_sizes
first
slots_exchange
dispatch_exchange
wait slots_exchange
unpack_slots
counting_sort
searchsorted
wait dispatch_exchange
gather
combine_exchange
wait slots_exchange
unpack_slots
counting_sort
searchsorted
wait dispatch_exchange
gather
combine_exchange
wait combine_exchange
weighted_sum
wait combine_exchange
weighted_sum""",
    )
    expecttest.assert_expected_inline(
        "\n".join(orders[1]),
        """\
dispatch_exchange
dispatch_exchange
wait dispatch_exchange
weighted_sum_backward
return_exchange
combine_exchange
wait dispatch_exchange
weighted_sum_backward
return_exchange
combine_exchange
wait return_exchange
weighted_sum
wait combine_exchange
weighted_sum
wait return_exchange
weighted_sum
wait combine_exchange
weighted_sum""",
    )
