"""torchtitan: a token dispatcher for its MoE layer, which two of torchtitan's overrides switch on.

    python -m torchtitan.train ... --override.imports moecomm.integrations.torchtitan.token_dispatcher
    ... --override.imports 'moecomm.integrations.torchtitan.token_dispatcher={"wire": "float8_e4m3"}'

Needs torchtitan 0.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.config import derive, override
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.common.token_dispatcher import BaseEPTokenDispatcher, LocalTokenDispatcher

import moecomm.functional as mf
from moecomm.errors import wrong_value
from moecomm.ops.exchange.start_op import STARTS
from moecomm.ops.routing.read_sizes import plan_sizes, read_sizes


class TokenDispatcher(BaseEPTokenDispatcher):
    """Each token travels once to each rank that has one of its experts, and one sum of their results comes back.

    torchtitan's layer calls it, and its experts run in between, unchanged. Where expert parallelism is off it sends nothing.

    Backward: to the tokens and their scores.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseEPTokenDispatcher.Config):
        """torchtitan's ``num_experts`` and ``top_k``, and options of `plan`, `dispatch` and `combine`.

        Args:
            wire: the 8-bit format in which rows travel, to the experts and back.
            backward_wire: the same for the gradients.
            placement: [P, E / P]. Row p lists the experts of rank p: row ``p * E / P + j`` of the experts' parameters is expert
                ``placement[p][j]`` of the router.
            max_rows: static mode. Each rank sends so many tokens to each rank, padding included.
            align: the rows of each expert begin at a multiple of it.
            check: find more faults, at the cost of extra exchanges.
        """

        wire: str | None = None
        backward_wire: str | None = None
        placement: list[list[int]] | None = None
        max_rows: int | None = None
        align: int = 1
        check: bool = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.wires: dict[str, Any] = {name: getattr(config, name) for name in ("wire", "backward_wire")}
        self.options: dict[str, Any] = {name: getattr(config, name) for name in ("placement", "max_rows", "align", "check")}
        self.group = ""  # this process alone, until torchtitan says which ranks share the experts

    def wire_meshes(self, *, ep_mesh: Any) -> None:
        """Take the mesh whose ranks share the experts; None where each process has all of them."""
        placement = self.options["placement"]
        if placement is not None and (held := sum(map(len, placement))) != self.num_experts:
            must = f"of {self.num_experts}, each once: torchtitan has parameters for no replicas"
            wrong_value("placement", f"of {held} experts", must)
        super().wire_meshes(ep_mesh=ep_mesh)
        self.group = "" if ep_mesh is None else ep_mesh.get_group().group_name

    def dispatch(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor, num_local_tokens_per_expert_E: Tensor
    ) -> tuple[Tensor, Tensor, mf.Plan]:
        """Send tokens to the ranks of their experts.

        Args:
            x_TD: [T, D], this rank's tokens.
            topk_scores_TK: [T, K], the weight of each expert in the token's sum.
            topk_expert_ids_TK: [T, K], ids of experts.
            num_local_tokens_per_expert_E: not used.

        Returns:
            [N, D], rows grouped by local expert; [L], the rows of each local expert, padding of ``align`` included; the plan.

        Raises:
            what `moecomm.functional.plan` and `moecomm.functional.dispatch` raise.
        """
        plan = mf.plan(topk_expert_ids_TK, topk_scores_TK, self.num_experts, self.group, like=x_TD, **self.options)
        rows = mf.dispatch(x_TD, plan, **self.wires)
        return rows, plan.offsets.diff(prepend=plan.offsets.new_zeros(1)), plan

    def combine(self, routed_output_RD: Tensor, metadata: mf.Plan, x_TD: Tensor) -> Tensor:
        """The weighted sum of each token's experts, [T, D], in the dtype of the tokens."""
        return mf.combine(routed_output_RD, metadata, dtype=x_TD.dtype, **self.wires)


class SelectiveCheckpointing(SelectiveAC):
    """torchtitan's selective activation checkpointing, which also saves what moecomm received: no exchange runs again in the backward."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set[Any]:
        """torchtitan's ops, moecomm's exchanges and the host synchronization of `plan`."""
        return super().get_save_ops() | set(STARTS) | {plan_sizes, read_sizes}


@override(target=LocalTokenDispatcher.Config, description="moecomm sends the tokens")
def token_dispatcher(config: Any, **options: Any) -> TokenDispatcher.Config:
    """The override that puts `TokenDispatcher` into each MoE layer, in place of the dispatcher of its config.

    Args:
        config: the dispatcher's config. The ``pad_multiple`` of one for low precision becomes ``align``.
        options: those of `TokenDispatcher.Config`.

    Raises:
        ValueError: an option has no such name.
    """
    options.setdefault("align", getattr(config, "pad_multiple", None) or 1)
    return derive(config, TokenDispatcher.Config, **options)


@override(target=SelectiveAC.Config, description="moecomm's exchanges are not repeated")
def selective_ac(config: Any) -> SelectiveCheckpointing.Config:
    """The override that makes selective activation checkpointing save what moecomm received."""
    return derive(config, SelectiveCheckpointing.Config)
