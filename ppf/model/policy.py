"""A policy says how many units every sub-layer keeps, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index


@dataclass(frozen=True)
class Policy:
    """Kept widths of every sub-layer. Immutable and hashable; ``from_json(p.to_json()) == p``.

    ``attention[l]`` is the number of kv-groups layer ``l`` keeps, ``ffn[l]`` its number of FFN channels; 0 removes the
    sub-layer. Both have length L.
    """

    attention: tuple[int, ...]
    ffn: tuple[int, ...]

    def __init__(self, attention: Sequence[int], ffn: Sequence[int]):
        # index() and not int(): a width of 170.67 is a mistake of the caller, never 170.
        object.__setattr__(self, "attention", tuple(index(w) for w in attention))
        object.__setattr__(self, "ffn", tuple(index(w) for w in ffn))

    @property
    def is_uniform(self) -> bool:
        """True if all layers keep the same widths (such a model is an ordinary Llama)."""
        return len(set(self.attention)) == 1 and len(set(self.ffn)) == 1

    def to_json(self) -> str:
        return json.dumps({"attention": self.attention, "ffn": self.ffn})

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """Inverse of :meth:`to_json`. Raises ``ValueError`` on text that is not a policy."""
        data = json.loads(text)
        try:
            return cls(_widths(data["attention"]), _widths(data["ffn"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a policy: needs integer lists 'attention' and 'ffn' ({error})") from None


def _widths(values: object) -> list[int]:
    if not isinstance(values, list) or any(isinstance(w, bool) or not isinstance(w, int) for w in values):
        raise TypeError(f"{values!r} is not a list of integers")
    return values
