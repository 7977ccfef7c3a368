"""The functions of moecomm: stateless collectives for Mixture-of-Experts layers of your own.

A token walks one way: `route` -> `plan` -> `dispatch` -> (your experts) -> `combine`; the backward pass walks it in reverse.
"""

from moecomm.plan import Plan, plan
from moecomm.slices import slice_gather, slice_scatter
from moecomm.tokens import combine, dispatch

__all__ = ["Plan", "combine", "dispatch", "plan", "slice_gather", "slice_scatter"]
