"""Budgets: what policies cost, and the policies that cost exactly what was asked for."""

from .limits import Budget, limit_budget, ratio_budget

__all__ = ["Budget", "limit_budget", "ratio_budget"]
