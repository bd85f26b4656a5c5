"""Which methods a comparison runs: names, and the true evaluations each is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...errors import InputError
from ...families import Family
from ..peers import PEERS
from .asis import AS_IS, unsuited

# PPF itself, with the evaluations it is given at each ratio.
_OURS = {"dynamic": 0, "static": 150}
_GIVEN = {name: peer.evaluations for name, peer in PEERS.items()} | dict.fromkeys(AS_IS, 0) | _OURS
# Methods that use as many evaluations as they are given; others take what they need, at most what they are given.
_BY_BUDGET = ("random", "evopress", "evolution", "static")
# Methods that hold the gradients of all weights.
_BY_GRADIENTS = ("tracenas",)

ALL = ("wanda-sp as is", "flap as is", *PEERS, "evolution:5000", "dynamic", "static", "static:1500")


@dataclass(frozen=True)
class Method:
    """One row of a comparison: a method and the true evaluations it may spend at each ratio; ``by_name`` is False if
    it is there only because all were asked for."""

    name: str
    evaluations: int
    by_name: bool = field(default=True, compare=False)

    @property
    def is_ours(self) -> bool:
        return self.name in _OURS

    @property
    def label(self) -> str:
        """The name people read; with the evaluations where they make the method, or are not the usual ones."""
        shown = {"dynamic": "PPF dynamic", "static": "PPF static"}.get(self.name, self.name)
        told = self.name in _BY_BUDGET or self.evaluations != _GIVEN[self.name]
        return f"{shown} {self.evaluations:,}" if told else shown

    def key(self, ratio: float) -> str:
        """The name of its files at one ratio, of which it has all digits: two that differ in the seventh are two."""
        return f"{self.name.replace(' ', '-')}-{self.evaluations}-{float(ratio)!r}"


def parse_methods(text: str) -> list[Method]:
    """Methods of a list such as ``all`` or ``uniform,evolution:5000,static``; ``:N`` gives N evaluations.

    Raises ``InputError`` for unknown names and for what is not a number of evaluations.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    expanded = [(part, name != "all") for name in names for part in (ALL if name == "all" else (name,))]
    methods = list(dict.fromkeys(_parse(name, by_name) for name, by_name in expanded))
    if not methods:
        raise InputError("methods", repr(text), "names no method", f"Use all, or some of {', '.join(_GIVEN)}")
    return methods


def suited(methods: Sequence[Method], family: Family, resident: bool = True) -> tuple[list[Method], dict[str, str]]:
    """The methods that can be run on models of ``family``, whose weights are ``resident`` or stream, and of all others
    the label with the reason.

    Raises ``InputError`` for one of these that was asked for by name.
    """
    reasons = {method: reason for method in methods if (reason := _obstacle(method.name, family, resident))}
    for method, reason in reasons.items():
        if method.by_name:
            raise InputError("methods", method.name, reason, "Leave it out for this model")
    return [m for m in methods if m not in reasons], {m.label: reason for m, reason in reasons.items()}


def _obstacle(name: str, family: Family, resident: bool) -> str | None:
    if name in _BY_GRADIENTS and not resident:
        return "needs gradients of all weights at once, and these stream"
    return unsuited(name, family)


def _parse(text: str, by_name: bool) -> Method:
    name, colon, number = text.partition(":")
    if name not in _GIVEN:
        raise InputError("methods", name, "is not a method", f"Use all, or some of {', '.join(_GIVEN)}")
    if not colon:
        return Method(name, _GIVEN[name], by_name)
    if not number.isdecimal() or not _GIVEN[name] or not int(number):
        problem = "is not a number of evaluations" if _GIVEN[name] else "needs no evaluations"
        raise InputError("methods", text, problem, f"Write {name}" + (":1500, say" if _GIVEN[name] else " alone"))
    return Method(name, int(number), by_name)
