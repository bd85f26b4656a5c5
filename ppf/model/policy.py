"""A policy says how many units every sub-layer keeps, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from operator import index
from typing import Any, Literal

import msgspec

from ..errors import InputError
from ..storage.schemas import parse_as

FORMAT = 2
"""Version of a policy's JSON. Format 1 had no version and one list for attention and one for FFN at its top."""


class _Stored(msgspec.Struct):
    """The JSON, whose widths may be wrong still: only a grid knows."""

    format: Literal[2]
    widths: dict[str, list[int]]


class Policy(Mapping[str, tuple[int, ...]]):
    """Kept widths: a map from the kind of sub-layer to one width a layer. Immutable and hashable.

    ``Policy(attention, ffn)``: the number of kv-groups and of FFN channels that every layer keeps; 0 removes the
    sub-layer. Further kinds may be given by name. ``from_dict(p.to_dict()) == p``.
    """

    def __init__(self, /, attention: Sequence[int], ffn: Sequence[int], **others: Sequence[int]):
        # index() and not int(): a width of 170.67 is a mistake of the caller, never 170.
        given = {"attention": attention, "ffn": ffn} | others
        self._widths = {kind: tuple(map(index, widths)) for kind, widths in given.items()}

    def __getitem__(self, kind: str) -> tuple[int, ...]:
        return self._widths[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._widths)

    def __len__(self) -> int:
        return len(self._widths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self._widths == other._widths

    def __hash__(self) -> int:
        return hash(tuple(self._widths.items()))

    def __repr__(self) -> str:
        return f"Policy({', '.join(f'{kind}={list(widths)}' for kind, widths in self._widths.items())})"

    @property
    def attention(self) -> tuple[int, ...]:
        """kv-groups of every layer."""
        return self._widths["attention"]

    @property
    def ffn(self) -> tuple[int, ...]:
        """FFN channels of every layer."""
        return self._widths["ffn"]

    @property
    def is_uniform(self) -> bool:
        """True if all layers keep the same widths (such a model is an ordinary one of its family)."""
        return all(len(set(widths)) == 1 for widths in self._widths.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the format's version and the widths by kind."""
        return {"format": FORMAT, "widths": {kind: list(widths) for kind, widths in self._widths.items()}}

    @classmethod
    def from_dict(cls, data: Any) -> Policy:
        """Inverse of :meth:`to_dict`. Raises ``InputError`` for anything else, files of format 1 among them."""
        try:
            return cls(**msgspec.convert(data, _Stored).widths)
        except (msgspec.ValidationError, TypeError, UnicodeError):  # another shape, kinds missing, half a character
            raise _refused(data) from None

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Policy:
        """Inverse of :meth:`to_json`. Raises ``InputError`` on text that is not a policy."""
        try:
            return cls(**msgspec.json.decode(text, type=_Stored).widths)
        except (msgspec.DecodeError, TypeError, RecursionError):
            return cls.from_dict(parse_as(Any, "policy", text[:80], text, "Give a policy that PPF wrote"))


def _refused(data: Any) -> InputError:
    """Why ``data`` is not a policy."""
    remedy = (
        f'Write {{"format": {FORMAT}, "widths": {{"attention": [kv-groups of each layer], '
        '"ffn": [channels of each layer]}}'
    )
    if isinstance(data, dict) and "format" not in data and {"attention", "ffn"} <= set(data):
        return InputError("policy", "format 1", "was written by an older PPF (two lists, no format)", remedy)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        given = data.get("format", "(none)") if isinstance(data, dict) else type(data).__name__
        return InputError("policy.format", given, "is not a format this PPF reads", remedy)
    widths = data.get("widths")
    if not isinstance(widths, dict) or not {"attention", "ffn"} <= set(widths):
        return InputError("policy.widths", widths, "is not a map with the kinds attention and ffn", remedy)
    for kind, values in widths.items():
        if not isinstance(values, list) or any(isinstance(w, bool) or not isinstance(w, int) for w in values):
            return InputError(f"policy.widths.{kind}", values, "is not a list of whole numbers", remedy)
    return InputError("policy", data, "is not a policy", remedy)
