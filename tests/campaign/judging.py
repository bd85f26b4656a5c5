"""From how a process ended to a verdict: what counts as one line, as the same figure, as nothing left."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from . import children, trees
from .children import Ended
from .ground import Ground
from .outcomes import COSTLY, REFUSED, SILENT, SUCCESS, TRACEBACK, Verdict

_LONGEST_LINE = 1500
# Before it refuses a file, a command may compute and hold no more than this.
_SECONDS, _BYTES = 1.0, 500e6
_STOPPED = {129, 130, 143}
_SAID = "Error: ", "Interrupted. ", "Ended by "


def judged(ended: Ended, what: str, stopped: bool = False) -> Verdict:
    """Success, one line, or a traceback; ``stopped`` if a signal was to end it."""
    errors = [line for line in ended.err.splitlines() if line.startswith(_SAID)]
    problem = _problem(ended, errors, stopped)
    if problem:
        return Verdict(TRACEBACK, what, f"{problem}: {_tail(ended.err)}")
    return Verdict(SUCCESS if ended.code == 0 else REFUSED, what, errors[0] if errors else "")


def _problem(ended: Ended, errors: list[str], stopped: bool) -> str:
    if ended.hung:
        return "does not end"
    if ended.signal:
        return f"ends by signal {ended.signal}"
    if "Traceback (most recent call last)" in ended.err or "raceback was saved" in ended.err:
        return f"exit code {ended.code}, a traceback"
    if ended.code == 0:
        return "an error, and exit code 0" if errors else ""
    if ended.code not in ({1, 2} | (_STOPPED if stopped else set())):
        return f"exit code {ended.code}"
    if len(errors) != 1:
        return f"exit code {ended.code}, {len(errors)} lines"
    if len(errors[0]) > _LONGEST_LINE or not errors[0].isprintable():
        return "a line that no terminal shows"
    return ""


def _tail(err: str) -> str:
    """The last of a traceback that says something: the exception, and where it was raised."""
    lines = [line for line in err.splitlines() if line.strip()]
    places = [line.strip() for line in lines if re.match(r'\s+File ".*ppf/', line)]
    last = next((i for i, line in enumerate(lines) if line.startswith("Extension modules")), len(lines))
    return " | ".join([*places[-2:], *lines[:last][-3:]])[-900:]


def refused_cheaply(ended: Ended, verdict: Verdict) -> Verdict:
    """The verdict, unless that was a refusal that took too long or too much."""
    if verdict.outcome == REFUSED and (ended.seconds > 2 * _SECONDS or ended.grown > _BYTES):
        cost = f"{ended.seconds:.2f} s, {ended.grown / 1e6:.0f} MB before: {verdict.detail}"
        return Verdict(COSTLY, verdict.what, cost)
    return verdict


def asked(ground: Ground, words: tuple[object, ...], here: Path, what: str) -> Verdict:
    """The verdict on a command in ``here`` that must say what it says on an undamaged ground, or refuse."""
    ended = children.run(children.command(*words), here)
    verdict = judged(ended, what)
    if verdict.outcome != SUCCESS:
        return verdict
    usual, found = _usual(ground, words), _figures(ended.out, here)
    # What has a note, or says that other software saved the weights, was not silent.
    told = "Note: " in ended.err or (isinstance(found, dict) and found.get("saved_again") is True)
    if found != usual and not told:
        return Verdict(SILENT, what, f"{_first_difference(usual, found)}")
    return verdict


@cache
def _usual(ground: Ground, words: tuple[object, ...]) -> Any:
    """The figures of a command in a folder with undamaged copies of what its words name."""
    names = [word for word in words if isinstance(word, str) and (ground / word).exists()]
    with ground.scratch(*names) as here:
        ended = children.run(children.command(*words), here)
        if ended.code != 0:
            raise RuntimeError(f"{words} fails on what is undamaged: {ended.err}")
        return _figures(ended.out, here)


def _figures(out: str, here: Path) -> Any:
    """Standard output without times and places."""
    try:
        return trees.timeless(json.loads(out.replace(str(here), "…")))
    except ValueError:
        return out.replace(str(here), "…")


def _first_difference(one: Any, other: Any, place: str = "") -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() | other.keys():
            if one.get(name) != other.get(name):
                return _first_difference(one.get(name), other.get(name), f"{place}.{name}")
    return f"{place} is {str(other)[:150]}, not {str(one)[:150]}"


Attempt = Callable[[Ground, int], Verdict]
