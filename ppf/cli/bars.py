"""A policy as a bar chart in the terminal: one line a layer."""

from __future__ import annotations

from ..model.policy import Policy
from ..model.structure import Structure

_WIDTH = 24


def policy_bars(policy: Policy, structure: Structure) -> str:
    """Kept kv-groups and FFN channels of every layer, against the dense widths of ``structure``."""
    rows = [f"{'layer':>5}  {'attention (kv-groups)':<{_WIDTH + 10}}  FFN (channels)"]
    for layer, (groups, channels) in enumerate(zip(policy.attention, policy.ffn, strict=True)):
        attention = f"{_bar(groups, structure.kv_groups)} {f'{groups}/{structure.kv_groups}':<9}"
        rows.append(f"{layer:>5}  {attention}  {_bar(channels, structure.channels)} {channels}/{structure.channels}")
    return "\n".join(rows)


def _bar(kept: int, dense: int) -> str:
    filled = round(_WIDTH * kept / dense)
    return "█" * filled + "░" * (_WIDTH - filled)
