"""``ppf eval``: the perplexity of any checkpoint, dense or pruned, or of a selection of its units."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import lines, progress_bars, show
from .options import Device, Dtype, GpuMemoryGb, Json, Model, SequenceLength, TextFile, Weights, placement
from .protocols import protocol_size


def evaluate(
    model: Model,
    text: TextFile,
    sequence_length: SequenceLength = 512,
    tokens: Annotated[
        int | None, typer.Option(help="About so many, evenly spaced over the text; all if left out.")
    ] = None,
    selection: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Units that count, as JSON; the others as if they were zero.")
    ] = None,
    device: Device = "auto",
    weights: Weights = "auto",
    gpu_memory_gb: GpuMemoryGb = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity of a dense or pruned checkpoint on a text; with --selection of any mask, without surgery."""
    from ..fitting.perplexity import evaluate as measure

    with progress_bars() as progress:
        data = measure(
            model, text, selection, sequence_length=sequence_length, tokens=tokens, device=device, dtype=dtype,
            placement=placement(weights, gpu_memory_gb), progress=progress,
        )  # fmt: skip
    protocol = data["protocol"]
    facts = {
        "perplexity": f"{data['perplexity']:.4f}",
        "log-perplexity": f"{data['log_perplexity']:.6f} nats a token",
        "text": f"{protocol['text']} ({protocol['part']})",
        "tokens": protocol_size(protocol),
        "computed in": f"{data['dtype']} on {data['device']}, {data['seconds']:.2f} s",
    }
    if data["selection"] is not None:
        facts["selection"] = f"{selection}: {data['selection']['ratio']:.1%} of the decoder's parameters left out"
    show(as_json, data, lines(facts))
