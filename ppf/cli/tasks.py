"""``--tasks`` and what belongs to it, for the commands that judge models by tasks; and the table of their figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..errors import InputError, shown
from .options import COUNT

if TYPE_CHECKING:
    from ..fitting.tasks import Tasks

TaskNames = Annotated[
    str | None, typer.Option(metavar="A,B,…", help="Tasks of lm_eval or of --task-folder, such as arc_easy,hellaswag.")
]
TaskFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Tasks of your own: NAME.jsonl with items, or lm_eval's yaml.")
]
Limit = Annotated[int | None, typer.Option(callback=COUNT, metavar="N", help="Only the first N items of each task.")]
BatchSize = Annotated[int, typer.Option(callback=COUNT, metavar="N", help="Items of a task computed together.")]


def opened(names: str | None, folder: Path | None, limit: int | None, batch_size: int) -> Tasks | None:
    """What --tasks asks for, before any work; None without it.

    Raises ``InputError`` as :meth:`ppf.fitting.tasks.Tasks.open` does, and for an option that means nothing.
    """
    if names is None:
        for field, value in (("task-folder", folder), ("limit", limit)):
            if value is not None:
                raise InputError(field, value, "says how to judge by tasks, and there are none", "Add --tasks")
        return None
    from ..fitting.tasks import Tasks

    return Tasks.open(names, folder, limit, batch_size)


def tasks_table(tasks: dict[str, Any]) -> Table:
    """One row a figure, with one standard error on either side."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("task", "figure", "value", "±", "items", "few-shot", "version"):
        table.add_column(title, justify="left" if title in ("task", "figure") else "right", no_wrap=True)
    for name, judged in tasks.items():
        for figure, found in judged["figures"].items():
            error = "" if found["stderr"] is None else _digits(found["stderr"])
            facts = (str(judged.get(key, "")) for key in ("items", "few_shot", "version"))
            table.add_row(shown(name), shown(figure), _digits(found["value"]), error, *facts)
    return table


def _digits(value: float) -> str:
    """Four of a share, and one of a perplexity, which may be thousands: a terminal has no room for more."""
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
