"""``ppf fit``: learn once how much every layer can lose."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import ranks
from ..errors import shown as escaped
from .console import lines, progress_bars, show
from .info import run_facts
from .options import (
    COUNT,
    NUMBER,
    TOKENS,
    Device,
    Field,
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
    within,
)


def fit(
    model: Model,
    output: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the run; an unfinished one is resumed.")],
    text: TextInput | None = None,
    evaluations: Annotated[
        int, typer.Option(callback=within(0, 10**9), help="Policies to measure; more are better, 0 only calibrates.")
    ] = 600,
    device: Device = "auto",
    weights: Weights = "auto",
    gpu_memory_gb: GpuMemoryGb = None,
    seed: Seed = 0,
    eval_text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Evaluate on this text, not on the last quarter of --text.")
    ] = None,
    field: Field = None,
    split: Split = None,
    eval_split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Split of --eval-text; that of --text if left out.")
    ] = None,
    own_answers: Annotated[
        str | None,
        typer.Option(metavar="PROMPTS", help="Calibrate on what MODEL answers to these; --text then only evaluates."),
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(callback=COUNT, help="At most so many tokens an answer; 128.")
    ] = None,
    answer_temperature: Annotated[
        float | None, typer.Option(callback=NUMBER, help="Answers are drawn at this; 0 takes the likeliest tokens. 1.")
    ] = None,
    prompt_field: Annotated[
        str | None, typer.Option(metavar="NAME", help="Field of PROMPTS; that of --text if left out.")
    ] = None,
    prompt_split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Split of PROMPTS; that of --text if left out.")
    ] = None,
    ranking: Annotated[
        str, typer.Option(help="auto, magnitude, wanda-sp, flap-wifv, maw, cfsp, obs, taylor or loraprune.")
    ] = "flap-wifv",
    ffn_multiple: Annotated[int, typer.Option(callback=COUNT, help="FFN widths are multiples of this.")] = 64,
    sequence_length: SequenceLength = 512,
    calibration_tokens: Annotated[
        int, typer.Option(callback=TOKENS, help="At most so many tokens of calibration text.")
    ] = 131_072,
    evaluation_tokens: Annotated[
        int, typer.Option(callback=TOKENS, help="At most so many tokens of evaluation text.")
    ] = 16_384,
    predictor: Annotated[str | None, typer.Option(help="Kind of predictor: gp (default), mlp or cnn.")] = None,
    agent: Annotated[str | None, typer.Option(help="How the agent is trained: pathwise or actor-critic.")] = None,
    early_stop: Annotated[
        bool, typer.Option("--early-stop", help="Stop measuring once the predictor is right at the agent's policies.")
    ] = False,
    portable: Annotated[
        bool, typer.Option("--portable", help="Only policies that every export accepts; see docs/formats.md.")
    ] = False,
    wait: Wait = False,
    as_json: Json = False,
    timings: Timings = False,
) -> None:
    """Learn how much every layer of MODEL can lose, from a text. Interrupt it at will: the same command resumes."""
    from ..deliver.price import portable_prices
    from ..fitting.alone import is_finished
    from ..fitting.run import Settings
    from ..fitting.session import Session
    from ..fitting.stages import fit as fit_run
    from ..text import Text

    settings = Settings(
        evaluations, seed, ranking, ffn_multiple, sequence_length, calibration_tokens, evaluation_tokens
    )
    if predictor:
        settings = replace(settings, predictor=predictor)
    if agent:
        settings = replace(settings, agent=agent)
    settings = replace(settings, portable=portable, early_stop=early_stop)
    place = placement(weights, gpu_memory_gb)
    given = None if text is None else Text(text, field, split)
    judged_on = None if eval_text is None else Text(eval_text, field, eval_split or split)
    prompts = None if own_answers is None else Text(own_answers, prompt_field or field, prompt_split or split)
    finished = is_finished(output)
    with progress_bars() as progress:
        run = fit_run(
            model, given, output, settings=settings, eval_text=judged_on, own_answers=prompts,
            answer_tokens=answer_tokens, answer_temperature=answer_temperature, device=device, placement=place,
            progress=progress,
        )  # fmt: skip
        if not ranks.first():  # the rest is the work of one
            return
        if finished:
            warnings.warn(f"ppf: {escaped(output)} holds exactly this already: nothing was fitted", stacklevel=1)
        measured = portable and evaluations  # without evaluations nothing is measured, nor are prices
        prices = portable_prices(Session(run, device, placement=place), progress) if measured else []
    facts = run_facts(run) | ({"portable": prices} if measured else {})
    following = f"Next: ppf policy {output} --ratio 0.3, or ppf prune {output} --ratio 0.3 --output OUT"
    show(as_json, facts, _told(facts, output, prices), following, timings=timings)


def _told(facts: dict[str, Any], output: Path, prices: list[dict[str, Any]]) -> str:
    """What there is now, and of a portable run what that costs."""
    rows = facts["experience"]["rows"] or "none: policies come from calibration alone, and no perplexity is predicted"
    shown = {"run": output, "evaluations": rows, "seconds": f"{facts['seconds']:.0f}"}
    for price in prices:
        shown[f"portable at {price['ratio']:.1%}"] = (
            f"perplexity {price['perplexity']:.2f}; without the restriction {price['unrestricted']:.2f} or less "
            f"({price['evaluations']} evaluations): it costs at least {price['cost']:+.1%}"
        )
    return lines(shown)
