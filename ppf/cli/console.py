"""What the user sees: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from .. import ranks
from ..errors import printable, shown
from ..progress import Progress, silent
from ..timings import seconds

errors = Console(stderr=True)
"""Standard error; it follows ``sys.stderr`` when that is replaced."""

# Of a fact: generous, for paths and lists of names.
_LONGEST = 2000
_LABELS = {
    "answer": "Answering prompts (tokens)",
    "rank": "Choosing rankings",
    "calibrate": "Calibrating layers",
    "evaluate": "Measuring policies",
    "learn": "Training predictor and agent",
    "search": "Searching",
    "reconstruct": "Refitting layers",
    "recover": "Training (tokens)",
    "score": "Scoring tokens",
    "tasks": "Judging by tasks",
    "random": "Measuring random policies",
    "visited": "Measuring visited policies",
    "single": "Measuring single sub-layers",
    "rivals": "Training other predictors",
    "curve": "Learning curve",
    "compare": "Methods and ratios",
    "deliver": "Writing results",
    "demo": "Pruned and reloaded",
    "price": "Pricing portability",
}


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on standard output. Raises ``ValueError`` for NaN and infinities."""
    print(json.dumps(data, indent=2, allow_nan=False), file=sys.stdout)


def show(as_json: bool, data: dict[str, Any], *renderables: RenderableType, timings: bool = False) -> None:
    """A command's result: ``data`` for machines, or ``renderables`` for people; with ``timings`` also the seconds of
    every stage of this process, on standard error and in the JSON object. Of several processes the first one shows."""
    if not ranks.first():
        return
    if timings:
        data = data | {"timings": seconds()}
        errors.print(_timings_table(data["timings"]))
    if as_json:
        print_json(data)
        return
    console = Console()
    for renderable in renderables:
        # Paths and figures must survive being piped: no markup, no wrapping in the middle of a name.
        text = isinstance(renderable, str)
        console.print(printable(renderable) if text else renderable, markup=False, highlight=False, soft_wrap=text)


def _timings_table(spent: dict[str, float]) -> Table:
    """Stages in the order in which they began, and their sum, which is the wall time since the process began."""
    table, total = Table(box=box.SIMPLE_HEAD, pad_edge=False), sum(spent.values())
    for title in ("stage", "seconds", "share"):
        table.add_column(title, justify="left" if title == "stage" else "right", no_wrap=True)
    for stage, took in (*spent.items(), ("together", total)):
        table.add_row(stage, f"{took:,.2f}", f"{took / total:.1%}")
    return table


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """A callable for ``progress=`` arguments that draws one bar a stage, with rate and time left, on stderr. Of several
    processes the first one draws."""
    if not ranks.first():
        yield silent
        return
    columns = (
        TextColumn("{task.description:<30}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    tasks = {}
    with Bars(*columns, console=errors) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                # What a resumed stage starts with is not counted into its rate.
                tasks[stage] = bars.add_task(_LABELS.get(stage, stage), total=total, completed=done)
            bars.update(tasks[stage], total=total, completed=done)

        yield report


def lines(facts: dict[str, Any]) -> str:
    """Name and value of every fact, one a line, in two columns."""
    width = max(map(len, facts))
    return "\n".join(f"{name:<{width}}  {shown(value, _LONGEST)}" for name, value in facts.items())


class _Rate(ProgressColumn):
    """Items a second, or seconds an item where that is the larger number."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:,.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="cyan")
