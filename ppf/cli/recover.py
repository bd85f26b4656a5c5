"""``ppf recover``: train a pruned checkpoint for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
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
    method: Annotated[
        str | None,
        typer.Option(help="lora (default), full (default with --elastic), or norms (norm weights and biases only)."),
    ] = None,
    elastic: Annotated[
        bool,
        typer.Option("--elastic", help="Of a run: train all sizes at once; OUT becomes a run with them."),
    ] = False,
    smallest_ratio: Annotated[
        float | None, typer.Option(callback=NUMBER, help="Of --elastic: train ratios from this; 0.1 if left out.")
    ] = None,
    largest_ratio: Annotated[
        float | None, typer.Option(callback=NUMBER, help="Of --elastic: train ratios to this; 0.5 if left out.")
    ] = None,
    policies: Annotated[
        int | None, typer.Option(callback=COUNT, help="Of --elastic: sizes that each step trains; 3 if left out.")
    ] = None,
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
    """Train a pruned checkpoint, or with --elastic all sizes of a run, taught by the dense model. Interrupt it at will:
    the same command resumes.

    --weights says where the dense model's are. On many GPUs: torchrun --nproc-per-node N -m ppf recover ...
    """
    from ..deliver.recovery import ElasticSettings, RecoverySettings, recover_elastic
    from ..deliver.recovery import recover as recover_checkpoint
    from ..text import Text

    sizes = {"smallest": smallest_ratio, "largest": largest_ratio, "policies": policies}
    given = {name: value for name, value in ({"method": method} | sizes).items() if value is not None}
    _require_together(elastic, sizes)
    settings = (ElasticSettings if elastic else RecoverySettings)(
        tokens=tokens, learning_rate=learning_rate, distillation=distillation, sequence_length=sequence_length,
        batch_tokens=batch_tokens, micro_tokens=micro_tokens, rank=rank, seed=seed, **given,
    )  # fmt: skip
    place = placement(weights, gpu_memory_gb)
    with progress_bars() as progress:
        report = (recover_elastic if elastic else recover_checkpoint)(
            model, Text(text, field, split), output, settings=settings, teacher=teacher, device=device,
            placement=place, force=force, progress=progress,
        )  # fmt: skip
    told = elastic_summary(report, output) if elastic else summary(report, output)
    show(as_json, {"output": str(output)} | report, told, timings=timings)


def _require_together(elastic: bool, sizes: dict[str, float | None]) -> None:
    for name, value in sizes.items():
        if value is not None and not elastic:
            field = name if name == "policies" else f"{name}-ratio"
            raise InputError(field, value, "makes no sense for one size", "Add --elastic and name a run, or drop it")


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


def elastic_summary(told: dict[str, Any], output: Path) -> str:
    """What a run says of its elastic recovery, for people."""
    settings = told["settings"]
    spent = f"{told['tokens']:,} tokens in {told['steps']:,} steps, {told['seconds']:.0f} s"
    sizes = f"{settings['smallest']:.0%} to {settings['largest']:.0%} removed, {settings['policies']} sizes a step"
    facts = {
        "run": output,
        "recovered from": told["from"],
        "method": f"{settings['method']}, {spent}",
        "trained": sizes,
        "trained on": f"{Path(told['text']['path']).name}, {told['text']['training_tokens']:,} tokens of it",
        "teacher": f"{told['teacher']}, {settings['distillation']:.0%} of the loss" if told["teacher"] else "none",
    }
    for row in told["held_out"]:
        facts[f"perplexity {row['ratio']:.0%}"] = f"{row['before']:.2f} before, {row['after']:.2f} after"
    if told["dense"]:
        facts["dense"] = f"{told['dense']['perplexity']:.2f}"
    return lines(facts | {"measured on": protocol_line(told["protocol"])})
