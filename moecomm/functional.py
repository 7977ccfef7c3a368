"""The functions of moecomm: stateless collectives for your own Mixture-of-Experts layers.

A token takes this path: `route` -> `plan` -> `dispatch` -> (your experts) -> `combine`. The backward pass takes it in
reverse. docs/functions.md lists all functions.
"""

from moecomm.inspect.explain import explain
from moecomm.layer.capacity import limit_by_capacity
from moecomm.layer.combine import combine
from moecomm.layer.dispatch import dispatch, dispatch_quantized
from moecomm.layer.losses import attach_loss, load_balance_loss, update_bias, z_loss
from moecomm.layer.make_plan import plan
from moecomm.layer.plan import Plan
from moecomm.layer.quantized import Quantized, dequantize
from moecomm.layer.route import route
from moecomm.layer.row_experts import row_experts
from moecomm.layer.row_weights import row_weights
from moecomm.parallel.slices import slice_gather, slice_reduce, slice_scatter
from moecomm.parallel.sums import sum_gradient, sum_ranks
from moecomm.training.clip_grad_norm import clip_grad_norm_
from moecomm.training.replicas import sync_replica_grads_, sync_replicas_
from moecomm.training.sync_grads import sync_grads_
from moecomm.training.sync_params import sync_params, sync_params_

__all__ = [
    "Plan",
    "Quantized",
    "attach_loss",
    "clip_grad_norm_",
    "combine",
    "dequantize",
    "dispatch",
    "dispatch_quantized",
    "explain",
    "limit_by_capacity",
    "load_balance_loss",
    "plan",
    "route",
    "row_experts",
    "row_weights",
    "slice_gather",
    "slice_reduce",
    "slice_scatter",
    "sum_gradient",
    "sum_ranks",
    "sync_grads_",
    "sync_params",
    "sync_params_",
    "sync_replica_grads_",
    "sync_replicas_",
    "update_bias",
    "z_loss",
]
