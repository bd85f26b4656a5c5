"""``ppf eval``: the perplexity of any checkpoint, dense or pruned."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import lines, progress_bars, show
from .options import Device, Dtype, Json, Model, SequenceLength, TextFile

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


def evaluate(
    model: Model,
    text: TextFile,
    sequence_length: SequenceLength = 512,
    tokens: Annotated[
        int | None, typer.Option(help="About so many, evenly spaced over the text; all if left out.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity of a dense or pruned checkpoint on a text."""
    data = _measure(model, text, sequence_length, tokens, device, dtype)
    protocol = data["protocol"]
    facts = {
        "perplexity": f"{data['perplexity']:.4f}",
        "log-perplexity": f"{data['log_perplexity']:.6f} nats a token",
        "text": f"{protocol['text']} ({protocol['part']})",
        "tokens": f"{protocol['tokens']:,} in sequences of {protocol['sequence_length']}",
        "computed in": f"{data['dtype']} on {data['device']}, {data['seconds']:.2f} s",
    }
    show(as_json, data, lines(facts))


def _measure(
    model: Path, text: Path, sequence_length: int, tokens: int | None, device: str, dtype: str
) -> dict[str, Any]:
    from ..checkpoint import load_tokenizer
    from ..fitting.evaluation.scoring import model_log_perplexity
    from ..fitting.run import Protocol
    from ..text import check_context, pack, read_tokens, take_tokens

    packed = pack(read_tokens(text, load_tokenizer(model)), sequence_length)
    sequences = take_tokens(packed, tokens)
    part = "all of it" if len(sequences) == len(packed) else "evenly spaced sequences"
    loaded = load_for_computing(model, device, dtype)
    check_context(sequence_length, loaded.config.max_position_embeddings)
    start = time.perf_counter()
    with progress_bars() as progress:
        value = model_log_perplexity(loaded, sequences, progress)
    return {
        "model": str(model),
        "perplexity": math.exp(value),
        "log_perplexity": value,
        "protocol": Protocol.of_file(text, sequences, part).to_dict(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "seconds": time.perf_counter() - start,
    }


def load_for_computing(model: Path, device: str, dtype: str) -> PreTrainedModel:
    """The model in ``dtype``; "auto" is the stored one, or float32 where the device does not compute in it."""
    from ..checkpoint import load, resolve_device
    from ..fitting.evaluation.scoring import in_compute_dtype

    loaded = load(model, str(resolve_device(device)), dtype)
    return in_compute_dtype(loaded) if dtype == "auto" else loaded
