"""The fork server of the tests' ranks imports it: what each rank would do first is done.

The first compilation imports 600 modules and fills torch's tables: 2 s of CPU time for each rank, and 3.5 s where Inductor compiles. What
the tests' own modules import takes each rank 0.8 s.
"""

import expecttest  # noqa: F401
import hypothesis  # noqa: F401
import pytest  # noqa: F401
import torch
import torch._inductor.compile_fx  # noqa: F401

import moecomm.functional as mf


def layer(x: torch.Tensor) -> torch.Tensor:
    weights, experts = mf.route(x, 1)
    plan = mf.plan(experts, weights, 2)
    return mf.combine(mf.dispatch(x, plan), plan)


torch.set_num_threads(1)  # a fork of a process that has started OpenMP's threads waits for ever where it wants more than one
# A process that has started autograd's threads, which torch built for GPUs does, cannot be forked: without gradients none start.
x = torch.ones(3, 2, requires_grad=not torch.backends.cuda.is_built())
torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
torch._dynamo.reset()
