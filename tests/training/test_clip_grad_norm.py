"""clip_grad_norm_: over parameters of any kind on any meshes the norm, and the scaled gradients, of one process with all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import moecomm.functional as mf
from tests.spawn import run_ranks
from tests.traffic import Traffic

GATHER = "all_gather_into_tensor"
SHAPES = {
    "gate": (3, 5), "norm": (5,), "dense.into": (8, 5), "dense.out": (7, 3), "scalar": (), "none": (0, 3),
    "0.experts.into": (8, 4, 3), "0.experts.out": (8, 3, 4), "local.experts.out": (8, 2),
}  # fmt: skip


def gradients(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Of all parameters, whole."""
    seed = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=seed, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def with_gradient(grad: Tensor) -> Tensor:
    param = torch.zeros_like(grad).requires_grad_()
    param.grad = grad.clone()
    return param


def whole(grad: Tensor) -> Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def mixed_here(clip: float) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """2 x 2 ranks: dense DTensors over dp, experts over edp and ep, plain ones that are spread over ep, and plain ones that all have."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    dp = mesh._flatten("dp")
    placed: dict[str, Callable[[Tensor], Tensor]] = {
        "dense.into": lambda grad: distribute_tensor(grad, dp, [Shard(0)]),
        "dense.out": lambda grad: distribute_tensor(grad, dp, [Shard(0)]),  # 7 rows on 4 ranks
        "norm": lambda grad: distribute_tensor(grad, mesh, [Replicate(), Replicate()]),
        "0.experts.into": lambda grad: distribute_tensor(grad, mesh, [Shard(1), Shard(0)]),
        "0.experts.out": lambda grad: distribute_tensor(grad, mesh, [Replicate(), Shard(0)]),
        "local.experts.out": lambda grad: grad.chunk(2)[mesh.get_local_rank("ep")],
    }
    params = {name: with_gradient(placed.get(name, lambda grad: grad)(grad)) for name, grad in gradients().items()}
    params["frozen"], params["tied"] = torch.ones(3), params["gate"]
    spread: dict[Any, Any] = {"local.*": mesh["ep"], "*": ""}
    with Traffic() as traffic:
        norm = mf.clip_grad_norm_(params, clip, spread)
    assert traffic.reads == []
    grads = {name: whole(params[name].grad) for name in SHAPES}
    grads["local.experts.out"] = mf.slice_gather(params["local.experts.out"].grad, mesh["ep"])
    return norm, grads, traffic.collectives


@pytest.mark.parametrize("clip", [1.0, 1e6, float("inf"), 0.0])
def test_the_norm_over_several_meshes_counts_each_element_once_on_every_rank(clip: float) -> None:
    expected = {name: with_gradient(grad) for name, grad in gradients().items()}
    norm = torch.nn.utils.clip_grad_norm_(expected.values(), clip)
    first, *others = run_ranks(mixed_here, 4, clip)
    torch.testing.assert_close(first[0], norm, rtol=1e-13, atol=0)
    torch.testing.assert_close(first[1], {name: param.grad for name, param in expected.items()}, rtol=1e-12, atol=0)
    assert first[2] == [GATHER] * 3  # dp; edp; ep, for all that is spread over it
    assert all(torch.equal(other[0], first[0]) for other in others)


def stages_here() -> Tensor:
    """2 stages of a pipeline, of which the second has no experts, on 2 ranks each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "ep"))
    stage, ep = mesh.get_local_rank("pp"), mesh.get_local_rank("ep")
    grads = gradients()
    own = [name for name in SHAPES if ("experts" in name or name == "gate") == (stage == 0)]
    params = {name: with_gradient(grads[name].chunk(2)[ep] if "experts" in name else grads[name]) for name in own}
    spread: dict[Any, Any] = {"*": mesh["pp"]} if stage else {"gate": mesh["pp"], "*.experts.*": [mesh["ep"], mesh["pp"]]}
    return mf.clip_grad_norm_(params, 1.0, spread)


def test_the_norm_over_stages_of_a_pipeline_is_that_of_all_of_them() -> None:
    norm = torch.nn.utils.get_total_norm(gradients().values())
    for here in run_ranks(stages_here, 4):
        torch.testing.assert_close(here, norm, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_summed_in_higher_precision(dtype: torch.dtype) -> None:
    grads = [torch.full((1000,), 0.1, dtype=dtype), torch.full((3,), 5.0, dtype=torch.float64)]
    norm = torch.cat([grad.double() for grad in grads]).norm()
    params = [with_gradient(grad) for grad in grads]
    torch.testing.assert_close(mf.clip_grad_norm_(params, 1.0), norm, rtol=1e-6, atol=0)
    for param, grad in zip(params, grads, strict=True):
        scaled = (grad.double() / (norm + 1e-6)).to(param.dtype)
        torch.testing.assert_close(param.grad, scaled, rtol=max(1e-6, torch.finfo(dtype).eps), atol=0)
    large = [with_gradient(torch.full((), 1e19)) for _ in range(100)]  # of which the sum of squares, 1e40, is no float32
    assert mf.clip_grad_norm_(large, 1.0).item() == pytest.approx(1e20)


LARGE = {  # gradients whose squares, or whose norm, float32 cannot hold; and such as are not finite
    "squares": [[1e25, -3e25], [2.0]],
    "norm": [[3e38, 3e38, -2e38], [1.0, 3e38]],
    "many": [[3e38] * 5000, [-2e38] * 7],
    "infinite": [[1.0, float("inf")], [2.0]],
    "NaN": [[3.0, 4.0], [float("nan"), 1e25]],
}


@pytest.mark.parametrize("clip", [1.0, 0.0, 1e30, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_gradients_have_their_norm_and_those_that_are_not_finite_stay_as_they_are(dtype: torch.dtype, clip: float) -> None:
    for values in LARGE.values():
        grads = [torch.tensor(part, dtype=dtype) for part in values]
        params = [with_gradient(grad) for grad in grads]
        norm = mf.clip_grad_norm_(params, clip)
        want = torch.cat([grad.double() for grad in grads]).norm()
        torch.testing.assert_close(norm, want, rtol=1e-6, atol=0, equal_nan=True)
        assert norm.isfinite() == all(grad.isfinite().all() for grad in grads)
        factor = min(1.0, clip / (want + 1e-6)) if norm.isfinite() and clip < float("inf") else 1.0
        for param, grad in zip(params, grads, strict=True):
            # A factor below 2^-126 has the precision 2^-149.
            rounding = max(1e-6, torch.finfo(dtype).eps, 2.0**-149 / factor if factor else 0)
            scaled = (grad.double() * factor).to(dtype)
            torch.testing.assert_close(param.grad, scaled, rtol=rounding, atol=torch.finfo(dtype).smallest_normal, equal_nan=True)
            assert factor != 1 or torch.equal(param.grad.nan_to_num(7), grad.nan_to_num(7))


def broken_here(value: float) -> tuple[Tensor, Tensor, Tensor]:
    """One of the ranks has a gradient that is not finite, of a parameter that the ranks have parts of, with replicas or not."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    part, alike = torch.full((2, 3), 1e30), torch.ones(4)
    if mesh.get_rank() == 1:
        part[1, 2] = value
    params = {"part": with_gradient(part), "experts": with_gradient(part), "alike": with_gradient(alike)}
    spread: dict[Any, Any] = {"alike": "", "*": mesh}
    norm = mf.clip_grad_norm_(params, 1.0, spread, {"experts": ([[0, 1], [1, 2]], mesh)})
    return norm, params["part"].grad, params["alike"].grad


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e35])
def test_all_ranks_scale_or_none_whichever_has_a_gradient_that_is_not_finite(value: float) -> None:
    (norm, *first), (other, *second) = run_ranks(broken_here, 2, value)
    assert torch.equal(norm, other) or (norm.isnan() and other.isnan())
    wanted = value * math.sqrt(2)  # beside it the others are nothing
    assert norm.item() == pytest.approx(wanted, rel=1e-6, nan_ok=True)
    factor = 1 / norm.item() if norm.isfinite() else 1.0
    for part, alike in (first, second):
        assert part[0, 0].item() == pytest.approx(1e30 * factor)
        assert alike.tolist() == pytest.approx([factor] * 4)


def test_parameters_without_a_gradient_have_none_and_nothing_has_norm_0() -> None:
    param = torch.ones(2, requires_grad=True)
    assert mf.clip_grad_norm_([param], 1.0).item() == mf.clip_grad_norm_([], 1.0).item() == 0
    assert param.grad is None
    model = torch.nn.Linear(2, 1)
    model(torch.ones(2)).backward()
    assert mf.clip_grad_norm_(model, 1.0, {"weight": "", model.bias: ""}).item() == pytest.approx(3**0.5)


HOT = [[0, 1], [0, 2], [0, 3], [3, 4]]


def replicas_here() -> tuple[Tensor, Tensor, Tensor, list[str], list[str]]:
    """Experts that are on several ranks, plain and as a DTensor, beside a parameter that all ranks have."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("ep",))
    grads = gradients()
    mine = grads["0.experts.into"][HOT[mesh.get_rank()]]
    sharded = with_gradient(DTensor.from_local(mine, mesh, [Shard(0)]))
    params = {"gate": with_gradient(grads["gate"]), "0.experts.into": with_gradient(mine), "1.experts.into": sharded}
    spread: dict[Any, Any] = {"0.experts.*": mesh, "*": ""}
    with Traffic() as traffic:
        norm = mf.clip_grad_norm_(params, 1.0, spread, {"*.experts.*": (HOT, mesh)})
    return norm, params["0.experts.into"].grad, sharded.grad.to_local(), traffic.collectives, traffic.reads


def test_an_expert_that_is_on_several_ranks_counts_once() -> None:
    grads = gradients()
    whole = [with_gradient(grad) for grad in (grads["gate"], *[grads["0.experts.into"][:5]] * 2)]
    norm = torch.nn.utils.clip_grad_norm_(whole, 1.0)
    for (here, plain, sharded, collectives, reads), row in zip(run_ranks(replicas_here, 4), HOT, strict=True):
        torch.testing.assert_close(here, norm, rtol=1e-13, atol=0)
        torch.testing.assert_close(plain, whole[1].grad[row], rtol=1e-12, atol=0)
        assert torch.equal(plain, sharded)
        assert collectives == [GATHER]
        assert reads == []


def errors_here() -> None:
    mesh, ones = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",)), torch.ones(2, requires_grad=True)
    sparse, partial = torch.ones(2, requires_grad=True), DTensor.from_local(torch.ones(2), mesh, [Replicate()]).requires_grad_()
    sparse.grad = torch.ones(2).to_sparse()
    partial.grad = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    named = {"0.gate": ones, "0.experts.into": torch.ones(3, requires_grad=True)}
    wrong = [
        (lambda: mf.clip_grad_norm_(3, 1.0), TypeError, "params was int; it must be an nn.Module, a mapping to tensors, or tensors"),
        (lambda: mf.clip_grad_norm_(ones, "1"), TypeError, "max_norm was str; it must be a number"),
        (lambda: mf.clip_grad_norm_(ones, -1.0), ValueError, "max_norm was -1.0; it must be at least 0"),
        (lambda: mf.clip_grad_norm_(ones, float("nan")), ValueError, "max_norm was nan; it must be at least 0"),
        (lambda: mf.clip_grad_norm_([ones, ones.to("meta")], 1.0), ValueError, "params was on cpu and on meta; it must be on one device"),
        (lambda: mf.clip_grad_norm_(sparse, 1.0), TypeError, "params was '0' with a gradient of layout torch.sparse_coo"),
        (lambda: mf.clip_grad_norm_(partial, 1.0), ValueError, "params was '0' with a gradient of placements (Partial(sum),)"),
        (lambda: mf.clip_grad_norm_(named, 1.0, {"*.experts.*": mesh}), ValueError, "spread was a mapping of '*.experts.*'; it must be one "
            "with a key that matches '0.gate', as every parameter needs one"),
        (lambda: mf.clip_grad_norm_(named, 1.0, {"*.expert.*": mesh, "*": ""}), ValueError, "spread['*.expert.*'] was no parameter's first "
            "match; it must be that of at least one of '0.gate', '0.experts.into'"),
        (lambda: mf.clip_grad_norm_(named, 1.0, {3: mesh, "*": ""}), TypeError, "a key of spread was int; it must be a pattern of names"),
        (lambda: mf.clip_grad_norm_(named, 1.0, {"*": 3}), TypeError, "group was int"),
        (lambda: mf.clip_grad_norm_(named, 1.0, None, {"0.gate": [[0], [1]]}), TypeError, "replicas was a mapping to list; it must be a "
            "mapping to (placement, group)"),
        (lambda: mf.clip_grad_norm_(named, 1.0, None, {"0.gate": ([[0], [1]], mesh)}), ValueError, "params was a tensor of shape [2]; it "
            "must be of shape [1, ...], with the placement's L = 1 experts"),
        (lambda: mf.clip_grad_norm_(named, 1.0, None, {"*.expert.*": ([[0], [1]], mesh)}), ValueError, "replicas['*.expert.*'] was no "
            "parameter's first match"),
        (lambda: mf.clip_grad_norm_(named, 1.0, None, {"0.gate": ([[0, 0]], "")}), ValueError, "placement was [0, 0] on rank 0; it must "
            "be of different experts on a rank"),
    ]  # fmt: skip
    if dist.get_rank() == 0:
        for call, error, message in wrong:
            with pytest.raises(error, match=re.escape(message)), Traffic() as traffic:
                call()
            assert traffic.collectives == []


def test_a_wrong_argument_is_named_before_anything_is_sent() -> None:
    run_ranks(errors_here, 2)
