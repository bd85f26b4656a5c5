"""Figures for messages, rounded to the side on which they can be asked for."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal


def rounded(value: float, digits: int, up: bool) -> str:
    """``value`` with at most so many significant digits, never below it if ``up``, else never above it."""
    found = Context(digits, ROUND_CEILING if up else ROUND_FLOOR).plus(Decimal(repr(float(value))))
    return f"{float(found):.{digits}g}"
