"""What runs and their results say of an elastic recovery."""

from __future__ import annotations

from typing import Any


def elastic_line(told: dict[str, Any]) -> str:
    """How the weights were trained that all sizes share."""
    settings = told["settings"]
    return (
        f"{told['tokens']:,} tokens, {settings['method']}, {settings['smallest']:.0%} to {settings['largest']:.0%} "
        f"removed, from {told['from']}"
    )
