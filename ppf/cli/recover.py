"""``ppf recover``: train a pruned checkpoint for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import lines, progress_bars, show
from .options import (
    COUNT,
    NUMBER,
    TOKENS,
    Device,
    Field,
    Force,
    GpuMemoryGb,
    Json,
    Model,
    Seed,
    SequenceLength,
    Split,
    TextInput,
    Timings,
    Wait,
    Weights,
    placement,
)
from .protocols import protocol_line


def recover(
    model: Model,
    text: TextInput,
    output: Annotated[Path, typer.Option(metavar="OUT", help="Folder of the recovered checkpoint.")],
    field: Field = None,
    split: Split = None,
    tokens: Annotated[
        int, typer.Option(callback=TOKENS, help="Train on so many; a shorter text is read again and again.")
    ] = 5_000_000,
    method: Annotated[str, typer.Option(help="lora, full, or norms (norm weights and biases only).")] = "lora",
    teacher: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The dense model, if not where ppf.json says.")
    ] = None,
    distillation: Annotated[
        float, typer.Option(callback=NUMBER, help="Share of the dense model in the loss; 0 needs none.")
    ] = 1.0,
    learning_rate: Annotated[
        float | None, typer.Option(callback=NUMBER, help="At its peak; the method's own if left out.")
    ] = None,
    rank: Annotated[int | None, typer.Option(callback=COUNT, help="Of --method lora; 16 if left out.")] = None,
    sequence_length: SequenceLength = 512,
    batch_tokens: Annotated[int, typer.Option(callback=TOKENS, help="Tokens a step.")] = 8_192,
    micro_tokens: Annotated[
        int | None, typer.Option(callback=TOKENS, help="Tokens at once, of each process; as many as fit if left out.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    weights: Weights = "auto",
    gpu_memory_gb: GpuMemoryGb = None,
    force: Force = False,
    wait: Wait = False,
    as_json: Json = False,
    timings: Timings = False,
) -> None:
    """Train a pruned checkpoint, taught by the dense model. Interrupt it at will: the same command resumes.

    --weights says where the dense model's are. On many GPUs: torchrun --nproc-per-node N -m ppf recover ...
    """
    from ..deliver.recovery import RecoverySettings
    from ..deliver.recovery import recover as recover_checkpoint
    from ..text import Text

    settings = RecoverySettings(
        method, tokens, learning_rate, distillation, sequence_length, batch_tokens, micro_tokens, rank, seed
    )
    place = placement(weights, gpu_memory_gb)
    with progress_bars() as progress:
        report = recover_checkpoint(
            model, Text(text, field, split), output, settings=settings, teacher=teacher, device=device,
            placement=place, force=force, progress=progress,
        )  # fmt: skip
    show(as_json, {"output": str(output)} | report, summary(report, output), timings=timings)


def summary(report: dict[str, Any], output: Path) -> str:
    """What a recovered checkpoint's ``ppf.json`` says, for people."""
    recovery, measured, dense = report["recovery"], report["measured"], report["dense"]
    settings, protocol = recovery["settings"], measured["protocol"]
    share = settings["distillation"]
    facts = {
        "checkpoint": output,
        "recovered from": recovery["from"],
        "method": f"{settings['method']}, {recovery['tokens']:,} tokens in {recovery['steps']:,} steps, "
        f"{recovery['seconds']:.0f} s",
        "trained on": f"{Path(recovery['text']['path']).name}, {recovery['text']['training_tokens']:,} tokens of it",
        "teacher": f"{recovery['teacher']}, {share:.0%} of the loss" if recovery["teacher"] else "none",
        "perplexity": f"{recovery['before']['perplexity']:.2f} before, {measured['perplexity']:.2f} after"
        + (f", dense {dense['perplexity']:.2f}" if dense else ""),
        "measured on": f"{protocol_line(protocol)}, {measured['dtype']} on {measured['device']}",
    }
    return lines(facts)
