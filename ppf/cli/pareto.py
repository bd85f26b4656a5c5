"""``ppf pareto``: perplexity against size and latency."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from ..storage.locks import locked_folder, sweep
from .console import show
from .options import Json, RunFolder, Wait

_FILES = "pareto.json", "pareto.html"


def pareto(
    run: RunFolder,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the page; the RUN if left out.")] = None,
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Predicted and measured perplexity against size and, after `ppf profile`, latency: a page, JSON and a table."""
    from ..fitting.run import Run
    from ..lab.pareto import pareto as curve
    from ..lab.pareto import pareto_page
    from ..storage.files import write_json

    data, folder = curve(Run(run)), output or run
    with locked_folder(folder):
        sweep(folder, *_FILES)
        write_json(folder / _FILES[0], data)
        pareto_page(data).write(folder / _FILES[1])
    show(as_json, data, _table(data), f"Page: {folder / 'pareto.html'}")


def _table(data: dict) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("removed", *(f"{a.replace('_', ' ')}, {unit}" for a, unit in data["axes"].items()), "perplexity"):
        table.add_column(header, justify="right")
    for point in data["predicted"]:
        values = (f"{point[axis]:,.4g}" for axis in data["axes"])
        table.add_row(f"{point['ratio']:.1%}", *values, _told(point["predicted_perplexity"], point["predicted_range"]))
    return table


def _told(perplexity: float, known: list[float] | None) -> str:
    return f"{perplexity:.2f} " + ("(uncertainty not known)" if known is None else "({:.2f} to {:.2f})".format(*known))
