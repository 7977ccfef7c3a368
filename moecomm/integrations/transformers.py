"""Hugging Face Transformers: importing this module registers "moecomm" as experts function and as expert-parallel implementation.

    import moecomm.integrations.transformers
    AutoModelForCausalLM.from_pretrained(..., experts_implementation="moecomm")  # on each rank alone
    DistributedConfig(ep_size=4, ep_implementation="moecomm")  # tokens travel to the ranks of their experts

Needs transformers >= 5.23; the experts function alone works from 5.17 on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # also registers the op grouped_mm_fallback

import moecomm.functional as mf

GROUPED = (torch.bfloat16, torch.float16, torch.float32)  # dtypes of F.grouped_mm
WIRES = ("wire", "backward_wire")


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function "moecomm": all experts of the module, on this process alone.

    Args:
        self: a module of experts in the layout of Transformers' experts interface.
        hidden_states: [T, D], the tokens.
        top_k_index: [T, K], ids of experts. In a module of expert-parallel experts the id ``num_experts`` is none of them.
        top_k_weights: [T, K], the weight of each expert.

    Returns:
        [T, D], of hidden_states' dtype: the weighted sum of each token's experts.

    Raises:
        ExpertIdError: an id is out of range.

    Backward: to hidden_states, top_k_weights and the experts' parameters.
    """
    if getattr(self, "_is_expert_parallel", False):  # Transformers' own exchange has run: other ranks' slots are marked
        top_k_index = top_k_index.masked_fill(top_k_index == self.num_experts, -1)
    plan = mf.plan(top_k_index, top_k_weights, self.num_experts, "", like=hidden_states)
    return _layer(self, hidden_states, plan, {})


def _layer(experts: Any, x: Tensor, plan: mf.Plan, wires: dict[str, Any]) -> Tensor:
    """[T, D] -> [T, D]: the weights are multiplied in before the last matmul, so that no [N, D] rows are kept for the backward."""
    rows = mf.dispatch(x, plan, **wires)
    expert = mf.row_experts(plan) if experts.has_bias else None  # [N]; -1 for padding
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    h = _linear(rows, getattr(experts, name), plan.offsets, experts.is_transposed)
    if expert is not None:
        h = h + _with_padding(getattr(experts, f"{name}_bias"))[expert]
    h = experts._apply_gate(h) if experts.has_gate else experts.act_fn(h)
    if getattr(experts, "has_post_expert_norm", False):  # the norm of a weighted row is not the weighted norm of the row
        y = _linear(h, experts.down_proj, plan.offsets, experts.is_transposed)
        y = y if expert is None else y + experts.down_proj_bias[expert]
        y = y.masked_fill((plan.row_order < 0).unsqueeze(1), 0)  # grouped_mm does not write padding: it may be NaN
        return mf.combine(experts.post_expert_norm(y), plan, dtype=x.dtype, **wires)
    weights = mf.row_weights(plan).unsqueeze(1)  # [N, 1]
    y = _linear((h * weights).to(h.dtype), experts.down_proj, plan.offsets, experts.is_transposed)
    if expert is not None:
        y = y + (experts.down_proj_bias[expert] * weights).to(y.dtype)
    return mf.combine(y, plan, weighted=False, dtype=x.dtype, **wires)


def _with_padding(bias: Tensor) -> Tensor:
    """[L, H] -> [L + 1, H]: a last row for padding, whose gradient grouped_mm's backward does not write: it may be NaN."""
    return F.pad(bias, (0, 0, 0, 1))


def _linear(rows: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """rows [N, in] times each expert's weight: [L, in, out] if ``transposed``, else [L, out, in]."""
    weight = weight if transposed else weight.transpose(-2, -1)
    rows = rows.to(weight.dtype)
    if _grouped_mm_takes(rows, weight):
        return F.grouped_mm(rows, weight, offs=offsets)
    return torch.ops.transformers.grouped_mm_fallback(rows, weight, offsets)


def _grouped_mm_takes(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's kernel takes these: no float64, rows of multiples of 16 bytes, and bfloat16 alone where it is traced."""
    if weight.dtype not in GROUPED or (torch.compiler.is_compiling() and weight.dtype != torch.bfloat16):
        return False
    return all(size * weight.element_size() % 16 == 0 for size in weight.shape[-2:])


def expert_parallel(**options: Any) -> type:
    """An expert-parallel implementation with options of `plan`, `dispatch` and `combine`, to be registered under a name.

    Transformers names an implementation and passes it no options, so each choice of options is a name of its own.

    Args:
        options: ``wire`` and ``backward_wire`` of `dispatch` and `combine`; ``max_rows``, ``align`` and ``check`` of `plan`.

    Returns:
        A subclass of Transformers' EPImplementation.

    Example::

        from transformers.distributed.expert_parallel import EPImplementationInterface

        EPImplementationInterface.register("moecomm_8_bits", expert_parallel(wire="float8_e4m3"))
        DistributedConfig(ep_size=4, ep_implementation="moecomm_8_bits")
    """
    from transformers.distributed.expert_parallel import EPImplementation

    wires = {name: value for name, value in options.items() if name in WIRES}
    of_plan = {name: value for name, value in options.items() if name not in WIRES}

    class MoECommEP(EPImplementation):
        """Each token travels once to each rank that has one of its experts. The ranks of a TP group send disjoint slices of their batch."""

        def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            self.experts = experts

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            given, tp = (hidden_states, top_k_index, top_k_weights), self.tp_mesh
            x, ids, weights = (mf.slice_scatter(t, tp) for t in given) if tp.size() > 1 else given
            num_experts: int = self.num_local_experts * self.ep_mesh.size()  # type: ignore[operator, assignment]
            plan = mf.plan(ids, weights, num_experts, self.ep_mesh, like=x, **of_plan)
            y = _layer(self.experts, x, plan, wires)
            return mf.slice_gather(y, tp, size=hidden_states.shape[0]) if tp.size() > 1 else y

    return MoECommEP


def _register() -> None:
    ALL_EXPERTS_FUNCTIONS.register("moecomm", experts_forward)
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError:  # before 5.23
        return
    EPImplementationInterface.register("moecomm", expert_parallel())


_register()
