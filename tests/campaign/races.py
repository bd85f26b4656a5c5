"""Two commands at once on the same run or the same output: both end in success or one line, and what is left is
whole."""

from __future__ import annotations

import random
import time
from itertools import combinations_with_replacement
from pathlib import Path

from . import children, trees
from .ground import Ground
from .judging import asked, judged
from .outcomes import FINE, LEFTOVER, REFUSED, SILENT, SUCCESS, TRACEBACK, UNRESUMABLE, Verdict
from .writers import WRITERS, Writer, undisturbed

PAIRS = list(combinations_with_replacement(WRITERS.values(), 2))


def attempt(ground: Ground, seed: int) -> Verdict:
    draw = random.Random(f"races {seed}")
    pair = PAIRS[seed % len(PAIRS)]
    first, second = pair if draw.random() < 0.5 else pair[::-1]
    # Most of what meets, meets early or late; a fit makes the run that others want.
    offset = draw.choice((0.0, draw.random() ** 2)) * undisturbed(first, ground).seconds
    what = f"{first.name} and after {offset:.2f} s {second.name}"
    with ground.scratch(*sorted({*first.changes, *second.changes})) as here:
        verdict, done = _together(ground, (first, second), offset, here, what)
        return verdict if verdict.outcome not in FINE else _whole(ground, (first, second), done, here, what)


def _together(
    ground: Ground, pair: tuple[Writer, Writer], offset: float, here: Path, what: str
) -> tuple[Verdict, list[Writer]]:
    """What became of them, and those that were not refused."""
    first = children.Child(pair[0].work(ground), here)
    time.sleep(offset)
    second = children.Child(pair[1].work(ground), here)
    verdicts = [judged(child.wait(), what) for child in (first, second)]
    bad = [verdict for verdict in verdicts if verdict.outcome not in FINE]
    if bad:
        return bad[0], []
    if all(verdict.outcome == REFUSED for verdict in verdicts):
        return Verdict(TRACEBACK, what, f"both were refused: {verdicts[0].detail} {verdicts[1].detail}"), []
    return verdicts[0], [one for one, verdict in zip(pair, verdicts, strict=True) if verdict.outcome != REFUSED]


def _whole(ground: Ground, pair: tuple[Writer, Writer], done: list[Writer], here: Path, what: str) -> Verdict:
    """Every output is that of one of the commands ``done``, nothing else is there, and the run answers as it did."""
    for folder in ("out", "even"):
        if verdict := _one_of(ground, done, here, folder, what):
            return verdict
    usual = {name for writer in pair for name in undisturbed(writer, ground).names}
    if more := sorted(trees.names(here) - usual):
        return Verdict(LEFTOVER, what, ", ".join(more)[:300])
    if (here / "run").exists() and not any(writer.name == "fit" for writer in pair):
        verdict = asked(ground, ("policy", "run", "--ratio", 0.3, "--json"), here, what)
        if verdict.outcome != SUCCESS:
            return Verdict(UNRESUMABLE, what, f"the run afterwards: {verdict.detail}")
    return Verdict(SUCCESS, what)


def _one_of(ground: Ground, done: list[Writer], here: Path, folder: str, what: str) -> Verdict | None:
    found = _below(trees.contents(here), folder)
    wanted = [_below(undisturbed(writer, ground).contents, folder) for writer in done]
    wanted = [contents for contents in wanted if contents]
    if not wanted:
        return None
    differs = min((trees.differing(one, found) for one in wanted), key=len)
    return Verdict(SILENT, what, f"{folder} is neither's: {', '.join(differs)}"[:300]) if differs else None


def _below(contents: dict[str, str], folder: str) -> dict[str, str]:
    return {name: digest for name, digest in contents.items() if name.startswith(f"{folder}/")}
