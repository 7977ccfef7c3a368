"""The functions of moecomm: stateless collectives for Mixture-of-Experts layers of your own.

A token walks one way: `route` -> `plan` -> `dispatch` -> (your experts) -> `combine`; the backward pass walks it in reverse.
"""

from moecomm.capacity import limit_by_capacity
from moecomm.clip import clip_grad_norm_
from moecomm.explain import explain
from moecomm.losses import attach_loss, load_balance_loss, update_bias, z_loss
from moecomm.plan import Plan, plan
from moecomm.replicas import sync_replica_grads_, sync_replicas_
from moecomm.route import route
from moecomm.slices import slice_gather, slice_reduce, slice_scatter
from moecomm.sums import sum_gradient, sum_ranks
from moecomm.sync import sync_params, sync_params_
from moecomm.sync_grads import sync_grads_
from moecomm.tokens import Quantized, combine, dispatch, dispatch_quantized

__all__ = [
    "Plan",
    "Quantized",
    "attach_loss",
    "clip_grad_norm_",
    "combine",
    "dispatch",
    "dispatch_quantized",
    "explain",
    "limit_by_capacity",
    "load_balance_loss",
    "plan",
    "route",
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
