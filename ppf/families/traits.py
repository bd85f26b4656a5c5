"""Traits: what a model's arithmetic has beyond that of a plain Llama. Fast paths say which they serve.

Some belong to a family (its declaration has them), the others are read off the model's configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from .base import Family

# Rotary embeddings whose angles depend on the length of the text at hand.
_LENGTH_DEPENDENT = ("dynamic", "longrope")

_READ: dict[str, Callable[[Any], bool]] = {
    "another norm": lambda c: not hasattr(c, "rms_norm_eps"),
    "window": lambda c: _window(c) is not None,
    "activation": lambda c: activation(c) != "silu",
    "score cap": lambda c: getattr(c, "attn_logit_softcapping", None) is not None,
    "logit transform": lambda c: logit_cap(c) is not None or logit_scale(c) != 1.0,
    "score scale": lambda c: _score_scale(c) is not None,
    "partial rotation": lambda c: any(p.get("partial_rotary_factor", 1.0) != 1.0 for p in rotations(c)),
    "several rotations": lambda c: len(rotations(c)) > 1,
    "length-dependent rotation": lambda c: any(p.get("rope_type") in _LENGTH_DEPENDENT for p in rotations(c)),
    "unrotated layers": lambda c: 0 in (getattr(c, "no_rope_layers", None) or ()),
    "two-way attention": lambda c: bool(getattr(c, "use_bidirectional_attention", False)),
}


def traits_of(family: Family, config: Any) -> frozenset[str]:
    """The traits of ``config``'s model."""
    found = {name for name, holds in _READ.items() if holds(config)}
    found |= {name for name, has in _declared(family).items() if has}
    return family.traits | found


def unserved(traits: Collection[str], served: Collection[str]) -> str | None:
    """Why a path that serves ``served`` cannot run a model with ``traits``, to end a sentence with; None if it can."""
    missing = sorted(set(traits) - set(served))
    return f"it has what this path does not compute: {', '.join(missing)}" if missing else None


def activation(config: Any) -> str:
    """Name of the FFN's activation function."""
    return getattr(config, "hidden_activation", None) or config.hidden_act


def logit_cap(config: Any) -> float | None:
    """c of logits c · tanh(logits / c), or None."""
    return getattr(config, "final_logit_softcapping", None)


def logit_scale(config: Any) -> float:
    """What logits are divided by."""
    return float(getattr(config, "logits_scaling", None) or 1.0)


def rotations(config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings' parameters: one set, or one for each type of layer."""
    parameters = config.rope_parameters or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _declared(family: Family) -> dict[str, bool]:
    return {
        "head norm": bool(family.attention.head_norms),
        "sandwich norms": any(part.before and part.after for part in family.parts.values()),
        "post-norms": any(part.after and not part.before for part in family.parts.values()),
    }


def _window(config: Any) -> int | None:
    types = getattr(config, "layer_types", None)
    if types is not None and "sliding_attention" not in types:
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)


def _score_scale(config: Any) -> float | None:
    """What scores are multiplied by instead of one over the root of the head size."""
    if getattr(config, "query_pre_attn_scalar", None) is not None:
        return config.query_pre_attn_scalar**-0.5
    return getattr(config, "attention_multiplier", None)
