"""One graph for all ranks: each rank of a mesh traces for itself, and all come to the same key in the compile cache."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor import codecache
from torch.distributed.device_mesh import init_device_mesh

import moecomm.functional as mf
from tests.compile.graphs import unbacked
from tests.spawn import run_ranks

pytestmark = pytest.mark.slow


def layer(x: Tensor, experts: Tensor, weights: Tensor, group: Any) -> Tensor:
    plan = mf.plan(experts, weights, 8, group, like=x)
    y = mf.combine(mf.dispatch(x, plan).relu(), plan)
    return mf.slice_gather(mf.slice_scatter(y, group), group, size=y.shape[0])


def keys_here() -> list[str]:
    """What the compiled forward and backward are known by in the cache, with other sizes on each rank."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    tokens = 4 + rank // 2  # slices are of one size on the ranks of a group
    x = torch.randn(tokens, 16, generator=generator, requires_grad=True)
    weights = torch.rand(tokens, 2, generator=generator, requires_grad=True)
    experts = torch.randint(0, 8, (tokens, 2), generator=generator)
    unbacked(x, weights, experts)
    keys = []

    def kept(*args: Any, **kwargs: Any) -> tuple[str, list[str]]:
        keys.append(make_key(*args, **kwargs))
        return keys[-1]

    make_key = codecache.compiled_fx_graph_hash
    with torch.distributed.config.patch(compile_on_one_rank=True), patch.object(codecache, "compiled_fx_graph_hash", kept):
        torch.compile(layer, fullgraph=True)(x, experts, weights, mesh["ep"]).sum().backward()
    return [key for key, _ in keys]


@pytest.mark.exhaustive
def test_the_ranks_of_all_groups_along_a_dim_share_one_cache_entry() -> None:
    first, *others = run_ranks(keys_here, 4, timeout=300)
    assert len(first) == 2  # forward and backward
    assert others == [first] * 3
