"""``ppf compare``: PPF and other people's methods on equal terms."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from ..errors import InputError
from .console import progress_bars, show
from .options import (
    COUNT,
    TOKENS,
    Device,
    Field,
    GpuMemoryGb,
    Json,
    Seed,
    Split,
    TextInput,
    Timings,
    Wait,
    Weights,
    placement,
)
from .tasks import BatchSize, Limit, TaskFolder, TaskNames, opened

if TYPE_CHECKING:
    from ..fitting.session import Session
    from ..model.stream import Placement
    from ..progress import Progress
    from ..text import Text


def compare(
    path: Annotated[Path, typer.Argument(metavar="MODEL|RUN", help="A run, or a checkpoint to fit first.")],
    text: TextInput,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the comparison; an unfinished one resumes.")],
    field: Field = None,
    split: Split = None,
    ratios: Annotated[str, typer.Option(help="Shares of the decoder's parameters to remove.")] = "0.2,0.3,0.4,0.5",
    methods: Annotated[
        str, typer.Option(help="all, or a list of methods; NAME:N gives a searching one N evaluations a ratio.")
    ] = "all",
    tokens: Annotated[
        int | None, typer.Option(callback=TOKENS, help="Report on about so many tokens of the text; all if left out.")
    ] = None,
    fit_text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="For a MODEL: the text to fit on. For a RUN: not used.")
    ] = None,
    fit_evaluations: Annotated[int, typer.Option(callback=COUNT, help="For a MODEL: evaluations of the fit.")] = 600,
    tasks: TaskNames = None,
    task_folder: TaskFolder = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    weights: Weights = "auto",
    gpu_memory_gb: GpuMemoryGb = None,
    seed: Seed = 0,
    wait: Wait = False,
    as_json: Json = False,
    timings: Timings = False,
) -> None:
    """Perplexity of PPF's and other methods' policies on a text that none of them was chosen on, and what tasks say."""
    from ..fitting.evaluation.shared import led
    from ..lab.comparison import compare as compare_methods
    from ..lab.comparison import parse_methods
    from ..lab.comparison.page import table_of, tasks_table_of
    from ..text import Text

    chosen, shares, place = parse_methods(methods), _ratios(ratios), placement(weights, gpu_memory_gb)
    judged = opened(tasks, task_folder, limit, batch_size)
    with progress_bars() as progress:
        fitted_on = None if fit_text is None else Text(fit_text, field, split)
        session = _open(path, fitted_on, fit_evaluations, output, device, place, seed, progress)
        asked = Text(text, field, split)
        work = partial(compare_methods, session, asked, output, chosen, shares, tokens, seed, progress, judged)
        data = led(session, work)
    if data is None:  # the first process has it
        return
    tables = [_table(*table) for table in (table_of(data), tasks_table_of(data)) if table is not None]
    show(as_json, data, _title(data), *tables, f"Page: {output / 'comparison.html'}", timings=timings)


def _ratios(text: str) -> list[float]:
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise InputError("ratios", text, "is not a list of numbers", "Write 0.2,0.3,0.5, say") from None


def _open(
    path: Path, text: Text | None, evaluations: int, output: Path, device: str, place: Placement, seed: int,
    progress: Progress,
) -> Session:  # fmt: skip
    """The run at ``path``, or one fitted to the model at ``path`` that stands beside the comparison; with weights."""
    from ..fitting.run import Run, Settings
    from ..fitting.run.manifest import is_run
    from ..fitting.session import Session
    from ..fitting.stages import fit

    if is_run(path):
        if text is not None:
            raise InputError("fit-text", text.given, "makes no sense with a run, which is fitted already", "Drop it")
        return Session(Run(path), device, placement=place)
    if text is None:
        raise InputError("fit-text", "(none)", f"{path} is not a run and must be fitted", "Give --fit-text FILE")
    folder = output.with_name(output.name + "-run")
    settings = Settings(evaluations, seed)
    run = fit(path, text, folder, settings=settings, device=device, placement=place, progress=progress)
    return Session(run, device, placement=place)


def _title(data: dict[str, Any]) -> str:
    protocol = data["protocol"]
    return (
        f"Perplexity on {Path(protocol['text']).name}, {protocol['tokens']:,} tokens in sequences of "
        f"{protocol['sequence_length']}; evaluations and seconds a ratio"
    )


def _table(headers: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
