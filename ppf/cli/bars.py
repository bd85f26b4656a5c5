"""A policy as a bar chart in the terminal: one line a layer."""

from __future__ import annotations

import sys

from ..model.policy import Policy
from ..model.structure import Structure

_WIDTH = 24
_FINE, _COARSE = "█░", "#."


def policy_bars(policy: Policy, structure: Structure) -> str:
    """Kept kv-groups and FFN channels of every layer, against the widths that this layer has in ``structure``."""
    rows = [f"{'layer':>5}  {'attention (kv-groups)':<{_WIDTH + 10}}  FFN (channels)"]
    for layer, (attention, ffn) in enumerate(zip(structure.attention, structure.ffn, strict=True)):
        groups, channels = _bar(policy.attention[layer], attention.units), _bar(policy.ffn[layer], ffn.units)
        rows.append(f"{layer:>5}  {groups:<{_WIDTH + 10}}  {channels}")
    return "\n".join(rows)


def _bar(kept: int, whole: int) -> str:
    if not whole:  # the source has no such sub-layer
        return f"{'':{_WIDTH}} -"
    filled = round(_WIDTH * kept / whole)
    full, empty = _marks()
    return full * filled + empty * (_WIDTH - filled) + f" {kept}/{whole}"


def _marks() -> str:
    """Two characters that standard output can show."""
    try:
        _FINE.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return _COARSE
    return _FINE
