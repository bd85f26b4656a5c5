"""``ppf report``: how far a run's predictor can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from .console import lines, progress_bars, show
from .options import COUNT, Device, GpuMemoryGb, Json, RunFolder, Timings, Wait, Weights, placement

# What 80 columns have no room for.
_PAGE_ONLY = ("Kendall", "MAE", "spread")


def report(
    run: RunFolder,
    held_out: Annotated[
        int, typer.Option(callback=COUNT, help="Random policies at each ratio, and half as many visited.")
    ] = 200,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the report; default: the run.")] = None,
    compare: Annotated[str, typer.Option(help="Other kinds of predictor to train beside it, such as mlp,cnn.")] = "",
    device: Device = "auto",
    weights: Weights = "auto",
    gpu_memory_gb: GpuMemoryGb = None,
    wait: Wait = False,
    as_json: Json = False,
    timings: Timings = False,
) -> None:
    """Measure policies the run has not seen, and score its predictor on them within each ratio. Resumes when killed."""
    from ..fitting.evaluation.shared import led
    from ..fitting.run import Run
    from ..fitting.session import Session
    from ..lab.report import report as report_card

    session = Session(Run(run), device, placement=placement(weights, gpu_memory_gb))
    kinds = tuple(kind for kind in compare.split(",") if kind)
    with progress_bars() as progress:
        data = led(session, lambda: report_card(session, output, held_out, kinds, progress))
    if data is None:  # the first process has it
        return
    speed = data["latency"]
    facts = {
        "one policy": f"{speed['milliseconds']:.2f} ms, a true evaluation {speed['evaluation_milliseconds']:,.1f} ms",
        "in a batch": f"{speed['per_second']:,.0f} policies a second on {data['device']}",
        "page": (output or run) / "report.html",
    }
    show(as_json, data, *(_table(data, group) for group in data["scores"]), lines(facts), timings=timings)


def _table(data: dict, group: str) -> Table:
    from ..lab.report.page import score_table

    headers, rows = score_table(data["scores"][group])
    wanted = [index for index, header in enumerate(headers) if header not in _PAGE_ONLY]
    table = Table(title=f"{group} policies, {data['kind']}", box=box.SIMPLE)
    for index in wanted:
        table.add_column(headers[index], justify="right")
    for row in rows:
        table.add_row(*(row[index] for index in wanted))
    return table
