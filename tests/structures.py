"""Structures of models that do not exist: for tests that look at widths and costs only."""

from __future__ import annotations

from dataclasses import replace

from ppf.model.structure import Structure, SubLayer


def llama_structure(layers: int, hidden: int, groups: int, heads: int, head_dim: int, channels: int) -> Structure:
    """A Llama of equal layers with ``heads`` query heads in each of its ``groups`` kv-groups."""
    attention = SubLayer(groups, (2 * heads + 2) * head_dim * hidden, heads * head_dim)
    return Structure(hidden, head_dim, (attention,) * layers, (SubLayer(channels, 3 * hidden, 1),) * layers)


def irregular_structure() -> Structure:
    """Six layers such as a pruned model has: of different widths; layer 2 has no FFN, layer 3 no attention, layer 4
    neither."""
    dense, absent = llama_structure(6, 48, 3, 2, 8, 64), SubLayer(0, 0, 1)
    groups, channels = (2, 3, 3, 0, 0, 1), (64, 48, 0, 64, 0, 32)
    attention = tuple(replace(s, units=n) if n else absent for s, n in zip(dense.attention, groups, strict=True))
    ffn = tuple(replace(s, units=n) if n else absent for s, n in zip(dense.ffn, channels, strict=True))
    return Structure(48, 8, attention, ffn)
