"""``ppf eval``: what any checkpoint is worth, dense or pruned: its perplexity on a text, its figures on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import lines, progress_bars, show
from .options import (
    TOKENS,
    Device,
    Dtype,
    Field,
    GpuMemoryGb,
    Json,
    Model,
    SequenceLength,
    Split,
    TextInput,
    Weights,
    placement,
)
from .protocols import protocol_size
from .tasks import BatchSize, Limit, TaskFolder, TaskNames, opened, tasks_table


def evaluate(
    model: Model,
    text: TextInput | None = None,
    field: Field = None,
    split: Split = None,
    sequence_length: SequenceLength = 512,
    tokens: Annotated[
        int | None, typer.Option(callback=TOKENS, help="About so many, evenly spaced over the text; all if left out.")
    ] = None,
    selection: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Units that count, as JSON; the others as if they were zero.")
    ] = None,
    tasks: TaskNames = None,
    task_folder: TaskFolder = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    weights: Weights = "auto",
    gpu_memory_gb: GpuMemoryGb = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity of a dense or pruned checkpoint on a text, and its figures on tasks: one of them, or both. With
    --selection the perplexity of any mask of units, without surgery."""
    from ..fitting.perplexity import evaluate as measure
    from ..text import Text

    asked = None if text is None else Text(text, field, split)
    judged = opened(tasks, task_folder, limit, batch_size)
    with progress_bars() as progress:
        data = measure(
            model, asked, selection, tasks=judged, sequence_length=sequence_length, tokens=tokens, device=device,
            dtype=dtype, placement=placement(weights, gpu_memory_gb), progress=progress,
        )  # fmt: skip
    facts = {} if data["protocol"] is None else _of_text(data, data["protocol"])
    facts["computed in"] = f"{data['dtype']} on {data['device']}, {data['seconds']:.2f} s"
    if data["selection"] is not None:
        facts["selection"] = f"{selection}: {data['selection']['ratio']:.1%} of the decoder's parameters left out"
    tables = [] if data["tasks"] is None else [tasks_table(data["tasks"])]
    show(as_json, data, *tables, lines(facts))


def _of_text(data: dict[str, Any], protocol: dict[str, Any]) -> dict[str, str]:
    return {
        "perplexity": f"{data['perplexity']:.4f}",
        "log-perplexity": f"{data['log_perplexity']:.6f} nats a token",
        "text": f"{protocol['text']} ({protocol['part']})",
        "tokens": protocol_size(protocol),
    }
