"""What numbers say before and during a training: which rank holds which expert. `move_experts_` alone talks to other ranks."""

from moecomm.planner.move import move_experts_
from moecomm.planner.place import Links, imbalance, place

__all__ = ["Links", "imbalance", "move_experts_", "place"]
