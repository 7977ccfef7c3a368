"""Which split of the ranks trains a model fastest, and which rank holds which expert: functions over numbers.

`calibrate` and `move_experts_` alone talk to other ranks.

>>> from moecomm.planner import PRESETS, Model, search
>>> small = Model(layers=8, dim=1024, hidden=512, experts=64, k=4, heads=16, kv_heads=16, head=64, vocabulary=32000, batch=64)
>>> print(search(small, PRESETS["h100"], ranks=8).rows[0].split.call())
moe_mesh("cuda", pp=1, dp=8, cp=1, tp=1, ep=2, etp=1)
"""

from moecomm.planner.cluster import PRESETS, Cluster, Link
from moecomm.planner.cost import Times, Way
from moecomm.planner.imbalance import imbalance
from moecomm.planner.measure import calibrate
from moecomm.planner.memory import Memory
from moecomm.planner.model import Model, Parameters, parameters, read_config
from moecomm.planner.move import move_experts_
from moecomm.planner.place import Links, place
from moecomm.planner.search import assess, search
from moecomm.planner.splits import Split, splits
from moecomm.planner.table import Row, Table, Unfit

__all__ = [
    "PRESETS", "Cluster", "Link", "Links", "Memory", "Model", "Parameters", "Row", "Split", "Table", "Times", "Unfit", "Way", "assess",
    "calibrate", "imbalance", "move_experts_", "parameters", "place", "read_config", "search", "splits",
]  # fmt: skip
