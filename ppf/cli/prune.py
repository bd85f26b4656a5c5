"""``ppf prune``: a physically smaller checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .bars import policy_bars
from .console import lines, progress_bars, show
from .options import Context, Device, Flops, Force, Json, LatencyMs, MemoryGb, Ratio, RunFolder, TokensPerSecond
from .policy import predicted

if TYPE_CHECKING:
    from ..deliver.request import Request
    from ..deliver.results import Choice
    from ..fitting.run import Run
    from ..progress import Progress


def prune(
    run: RunFolder,
    output: Annotated[Path, typer.Option(metavar="OUT", help="Folder of the pruned checkpoint.")],
    ratio: Ratio = None,
    memory_gb: MemoryGb = None,
    flops: Flops = None,
    latency_ms: LatencyMs = None,
    tokens_per_second: TokensPerSecond = None,
    context: Context = 2048,
    search: Annotated[int | None, typer.Option(metavar="N", help="Spend N true evaluations on this size.")] = None,
    policy: Annotated[Path | None, typer.Option(metavar="FILE", help="Your own policy, as JSON.")] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="A result that every export accepts; says what that costs.")
    ] = False,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a pruned checkpoint: the agent's policy, the best of a search, or your own."""
    from ..deliver.request import Request
    from ..deliver.results import check_destination, deliver
    from ..fitting.run import Run

    opened = Run(run, device=device)
    check_destination(opened, output, force)
    with progress_bars() as progress:
        request = Request(ratio, memory_gb, flops, latency_ms, tokens_per_second, context)
        choice = _choose(opened, request, search, policy, portable, progress)
        report = deliver(opened, choice, output, force, progress)
    data, text = {"output": str(output)} | report, summary(report, output)
    if portable or opened.settings.portable:
        data["routes"] = _routes(output)
        text += "\n" + lines({f"export to {to}": problem or "yes" for to, problem in data["routes"].items()})
    show(as_json, data, text, policy_bars(choice.policy, opened.structure))


def _routes(output: Path) -> dict[str, str | None]:
    from ..deliver.export import open_source
    from ..deliver.export.routes import routes

    return routes(open_source(output))


def _choose(
    run: Run, request: Request, search: int | None, policy: Path | None, portable: bool, progress: Progress
) -> Choice:
    from ..deliver.portable import choose_portable
    from ..deliver.results import Choice, choose_for, read_policy

    if policy is not None:
        for name, value in (*request.given.items(), ("search", search), ("portable", portable or None)):
            if value is not None:
                raise InputError(name, value, "makes no sense with --policy, which decides everything", "Drop one")
        return Choice(read_policy(policy), "given")
    budget = request.budget(run)
    if not portable or run.settings.portable:
        return choose_for(run, budget, search, progress)
    for name, value in (("search", search), (budget.kind, None if budget.kind == "ratio" else budget.requested)):
        if value is not None:
            remedy = "Fit the model with --portable and prune that run, or give --ratio alone"
            raise InputError(name, value, "is not possible with --portable in a run that is not", remedy)
    return choose_portable(run, budget.requested)


def budget_line(budget: dict) -> str:
    """A result's budget: requested, predicted, measured, with a warning if these are apart."""
    measured = budget["measured"]
    text = f"--{budget['kind']} {budget['requested']:g} requested, {budget['predicted']:,.6g} predicted"
    if measured is None:
        return text
    text += f", {measured:,.6g} measured"
    if not budget["within_tolerance"]:
        text += f": {budget['off']:+.1%} off the prediction; profile again, on a quiet machine"
    return text


def summary(report: dict, output: Path) -> str:
    """What a result's ``ppf.json`` says, for people."""
    measured, parameters, guess = report["measured"], report["parameters"], report["predicted"]
    requested = report["requested_ratio"]
    protocol = measured["protocol"]
    facts = {
        "checkpoint": output,
        "policy from": report["source"]
        + (f" ({report['search_evaluations']} evaluations)" * (report["source"] == "search")),
        "ratio": f"{report['delivered_ratio']:.4f} delivered" + (f", {requested} requested" * (requested is not None)),
        "parameters": f"{parameters['pruned']:,} of {parameters['dense']:,}, embeddings included",
        "perplexity": f"{measured['perplexity']:.2f} measured, {measured['dtype']} on {measured['device']}",
        "predicted": predicted(guess["log_perplexity"], guess["log_perplexity_std"]),
        "dense": f"{report['dense']['perplexity']:.2f}" if report["dense"] else "not measured",
        "measured on": f"{Path(protocol['text']).name}, {protocol['part']}, {protocol['tokens']:,} tokens in sequences "
        f"of {protocol['sequence_length']}",
    }
    if cost := report.get("portable"):
        free = cost["unrestricted"]["perplexity"]
        facts["portable costs"] = f"{cost['cost']:+.1%} perplexity ({cost['perplexity']:.2f}, else {free:.2f})"
    if report.get("budget"):
        facts["budget"] = budget_line(report["budget"])
    return lines(facts)
