"""Budgets: what policies cost, and the policies that cost what was asked for; one class for each way to ask."""

from .base import Budget, Fitted
from .counted import FlopsBudget, MemoryBudget, RatioBudget, weight_costs
from .profile import PROFILE, Profile
from .timed import LatencyBudget, ThroughputBudget

BUDGETS: tuple[type[Budget], ...] = (RatioBudget, MemoryBudget, FlopsBudget, LatencyBudget, ThroughputBudget)
"""Every way to ask for a size."""

__all__ = [
    "BUDGETS",
    "PROFILE",
    "Budget",
    "Fitted",
    "FlopsBudget",
    "LatencyBudget",
    "MemoryBudget",
    "Profile",
    "RatioBudget",
    "ThroughputBudget",
    "weight_costs",
]
