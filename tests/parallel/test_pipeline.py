"""Pipeline stages, each with its experts spread over its own ranks: the same training as on one process, whatever the schedule."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleavedZeroBubble
from torch.nn.functional import mse_loss

from moecomm.mesh import moe_mesh
from tests import one_process
from tests.one_process import Sizes
from tests.spawn import run_ranks
from tests.stages import Split, Training, assert_is_one_process, train

pytestmark = pytest.mark.slow  # whole trainings; the inner loop has those of test_expert_parallel.py and test_hybrid.py

TRAINING = Training(Sizes(layers=4), steps=4, clip=2.0, microbatches=4)  # the norms of all steps are above the clip's
SPLIT = Split(pp=2, dp=2, tp=1, edp=1, ep=2, etp=1)
SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"]
FEW = ("GPipe", "ZBVZeroBubble")  # the simplest; and one that splits the backward pass, with two stages a rank
EAGER = [pytest.param(schedule, False, marks=() if schedule in FEW else pytest.mark.exhaustive) for schedule in SCHEDULES]
COMPILED = [pytest.param(schedule, True, marks=pytest.mark.exhaustive) for schedule in SCHEDULES]  # test_hybrid.py compiles GPipe's stages


@pytest.mark.parametrize(("schedule", "compiled"), [*EAGER, *COMPILED])
def test_pipelined_training_is_that_of_one_process(schedule: str, compiled: bool) -> None:
    expected = one_process.train(*TRAINING)
    assert min(expected.norms) > TRAINING.clip
    assert_is_one_process(run_ranks(train, 4, TRAINING, SPLIT, schedule, compiled, timeout=200), expected)


def sent_here(schedule: str) -> int:
    """How many all-to-alls a training starts."""
    with patch.object(dist, "all_to_all_single", side_effect=dist.all_to_all_single) as exchange:
        train(TRAINING, SPLIT, schedule)
    return exchange.call_count


def test_a_backward_pass_split_into_that_of_inputs_and_that_of_weights_exchanges_no_more() -> None:
    assert run_ranks(sent_here, 4, "InterleavedZeroBubble") == run_ranks(sent_here, 4, "Interleaved1F1B")


def compiled_module_here() -> None:
    module = torch.compile(nn.Linear(2, 2))
    pipeline = moe_mesh("cpu", pp=2, ep=2).dense["pp"]
    stages = [PipelineStage(module, s, 4, torch.device("cpu"), group=pipeline.get_group()) for s in (pipeline.get_local_rank(), 2)]
    with pytest.raises(RuntimeError, match="schedule is not supported with stage modules that have used torch.compile"):
        ScheduleInterleavedZeroBubble(stages, TRAINING.microbatches, loss_fn=mse_loss)


def test_zero_bubble_takes_a_compiled_function_but_torch_refuses_a_compiled_module() -> None:
    run_ranks(compiled_module_here, 4)
