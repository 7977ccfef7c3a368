"""The parts of a rank's memory against small cases by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.timing import saved
from moecomm.planner import Memory, Model, Split, Way, parameters
from moecomm.planner.cost import FULL, LEAN, NONE
from moecomm.planner.memory import kept_by_experts, peak
from moecomm.planner.routing import Fullest
from tutorials.demo.auto import model_of
from tutorials.demo.model import Groups, MoE, Shape

MODEL = Model(layers=4, dim=8, hidden=16, experts=8, k=2, heads=4, kv_heads=4, head=2, vocabulary=32, sequence=8, batch=16)
ALONE = Split(1, 1, 1, 1, 1, 1, 1)
PLAIN = Way(microbatches=1, fp8=False, static=False, recompute=NONE)
EVEN = Fullest(1.0, 0.5)
TOKENS = 8 * 16


def of(split: Split = ALONE, way: Way = PLAIN, full: Fullest = EVEN, model: Model = MODEL) -> Memory:
    return Memory(*(float(part) for part in peak(model, split, way, full)))


def test_parameters_and_moments_are_sharded_and_gradients_are_whole_while_microbatches_add_to_them() -> None:
    total = parameters(MODEL).total(MODEL)
    alone, sharded = of(), of(Split(1, 4, 1, 1, 2, 2, 1))
    assert (alone.parameters, alone.gradients, alone.optimizer) == (4 * total, 4 * total, 8 * total)
    assert (sharded.parameters, sharded.gradients, sharded.optimizer) == pytest.approx((total, total, 2 * total))
    whole = of(Split(1, 4, 1, 1, 2, 2, 1), PLAIN._replace(microbatches=2)).gradients
    assert whole == pytest.approx(4 * (total - 4 * 8 * 3 * 8 * 16 / 2))  # all but the experts of the other ep rank


def test_a_layer_keeps_the_inputs_of_its_matmuls_norms_and_products() -> None:
    of_attention = 2 * 8 + 8 + (3 + 2) * 8 + 8
    of_experts = 8 + 2 * (8 + 5 * 16) + 3 * 8  # and the gate's logits and probabilities
    assert of().activations == TOKENS * 2 * 4 * (of_attention + of_experts)
    split = Split(1, 4, 1, 1, 1, 4, 1)
    received = 4 * 0.5 * 8  # pairs from each of 4 ranks
    lean = of_attention + 8 + received + 2 * 2 * 16 + 3 * 8
    assert of(split, PLAIN._replace(recompute=LEAN)).activations == pytest.approx(TOKENS / 4 * 2 * 4 * lean)
    assert of(split, PLAIN._replace(recompute=FULL)).activations == pytest.approx(TOKENS / 4 * 2 * 4 * (8 + received))


@pytest.mark.parametrize("hidden", [32, 256])
def test_the_demos_experts_keep_as_many_bytes_as_are_predicted(hidden: int) -> None:
    shape = Shape(hidden=hidden)
    layer, x = MoE(shape, Groups()), torch.randn(512, shape.dim, requires_grad=True)
    kept = saved(lambda: layer(x), layer.parameters())
    predicted = float(kept_by_experts(model_of(shape, 2, torch.float32), ALONE, PLAIN, Fullest(1.0, 1.0)))
    assert kept == pytest.approx(512 * 4 * predicted, rel=0.03)


def test_the_first_stage_keeps_a_microbatch_for_each_stage() -> None:
    model = MODEL._replace(vocabulary=1)  # so that the last stage, which has the logits, does not need most
    whole = of(model=model).activations
    for microbatches in (4, 8):
        kept = of(Split(4, 1, 1, 1, 1, 1, 1), PLAIN._replace(microbatches=microbatches), model=model).activations
        assert kept == pytest.approx(whole * 4 / microbatches / 4)  # 4 in flight, of a quarter of the layers
    wide = MODEL._replace(vocabulary=4096)
    last = of(Split(4, 1, 1, 1, 1, 1, 1), PLAIN._replace(microbatches=4), model=wide)
    assert last.buffers > TOKENS / 4 * 4096 * 12  # logits, as they are, in float32 and as log-softmax


def test_static_buffers_and_full_ranks_need_more() -> None:
    split = Split(1, 4, 1, 1, 1, 4, 1)
    assert of(split, PLAIN._replace(static=True)).total() > of(split).total()
    assert of(split, full=Fullest(2.0, 0.8)).total() > of(split).total()
