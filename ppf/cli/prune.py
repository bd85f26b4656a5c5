"""``ppf prune``: a physically smaller checkpoint."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import ranks
from ..storage.locks import for_all, locked_result
from .bars import policy_bars
from .console import lines, progress_bars, show
from .elastic import elastic_line
from .options import (
    COUNT,
    Context,
    Device,
    Flops,
    Force,
    GpuMemoryGb,
    Json,
    LatencyMs,
    MemoryGb,
    Ratio,
    RunFolder,
    Timings,
    TokensPerSecond,
    Wait,
    Weights,
    placement,
)
from .policy import told_prediction, told_source
from .protocols import protocol_line
from .tasks import BatchSize, Limit, TaskFolder, TaskNames, opened, tasks_table

if TYPE_CHECKING:
    from ..deliver.request import Request
    from ..fitting.session import Session
    from ..fitting.tasks import Tasks

# A prediction is shown beside what was delivered if they are further apart.
_WORTH_TELLING = 1e-3


def prune(
    run: RunFolder,
    output: Annotated[Path, typer.Option(metavar="OUT", help="Folder of the pruned checkpoint.")],
    ratio: Ratio = None,
    memory_gb: MemoryGb = None,
    flops: Flops = None,
    latency_ms: LatencyMs = None,
    tokens_per_second: TokensPerSecond = None,
    context: Context = 2048,
    search: Annotated[
        int | None, typer.Option(callback=COUNT, metavar="N", help="Spend N true evaluations on this size.")
    ] = None,
    policy: Annotated[Path | None, typer.Option(metavar="FILE", help="Your own policy, as JSON.")] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="A result that every export accepts; says what that costs.")
    ] = False,
    refit: Annotated[
        str, typer.Option(metavar="HOW", help="fast: least squares. thorough: all kept weights; minutes on a GPU.")
    ] = "fast",
    tasks: TaskNames = None,
    task_folder: TaskFolder = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    weights: Weights = "auto",
    gpu_memory_gb: GpuMemoryGb = None,
    force: Force = False,
    wait: Wait = False,
    as_json: Json = False,
    timings: Timings = False,
) -> None:
    """Write a pruned checkpoint: the run's policy, the best of a search, or your own."""
    from ..deliver.api import decide
    from ..deliver.request import Request
    from ..deliver.results import check_refit, check_tasks, deliver
    from ..fitting.evaluation.shared import led
    from ..fitting.run import Run
    from ..fitting.session import Session
    from ..model.policy import Policy

    if search is None and not ranks.first():  # there is nothing to share
        return
    check_refit(refit)
    judged = opened(tasks, task_folder, limit, batch_size)
    session = Session(Run(run), device, placement=placement(weights, gpu_memory_gb))
    request = Request(ratio, memory_gb, flops, latency_ms, tokens_per_second, context)
    together = search is not None
    with progress_bars() as progress, _alone(output, together):
        ask = partial(_standing, session, request, output, search, portable, refit, force, judged)
        report = ranks.from_first(ask) if together else ask()
        if report is None:
            check_tasks(session, judged)
            chosen = partial(decide, session, request, search, policy, portable, refit, progress)
            choice = led(session, chosen) if together else chosen()
            report = None if choice is None else deliver(session, choice, output, force, progress, judged)
    if not ranks.first():
        return
    data, text = {"output": str(output)} | report, summary(report, output)
    tables = [tasks_table(report["tasks"])] if "tasks" in report else []
    if portable or session.run.settings.portable:
        data["routes"] = _routes(output)
        text += "\n" + lines({f"export to {to}": problem or "yes" for to, problem in data["routes"].items()})
    bars = policy_bars(Policy.from_dict(report["policy"]), session.run.structure)
    show(as_json, data, text, *tables, bars, timings=timings)


def _alone(output: Path, together: bool) -> AbstractContextManager[None]:
    """The lock on ``output``; ``together`` if all processes come here."""
    return for_all(lambda: locked_result(output)) if together else locked_result(output)


def _standing(
    session: Session, request: Request, output: Path, search: int | None, portable: bool, refit: str,
    force: bool, tasks: Tasks | None,
) -> dict[str, Any] | None:  # fmt: skip
    """The report of ``output`` if it is what is asked for, where finding that again would take evaluations; what costs
    none is compared when it is delivered. Raises ``InputError`` for an output that may not be written."""
    from ..deliver.results import check_destination, found_before, standing
    from ..deliver.standing import report_of

    there = not force and report_of(output) is not None
    if there and search is None and not portable:
        return None
    before = found_before(session, request.budget(session.run), output, search, portable, refit) if there else None
    found = None if before is None else standing(session, before, output, tasks)
    if found is None:
        check_destination(session.run, output, force)
    return found


def _routes(output: Path) -> dict[str, str | None]:
    from ..deliver.export import open_source
    from ..deliver.export.routes import routes

    return routes(open_source(output))


def budget_line(budget: dict) -> str:
    """A result's budget: requested, predicted, delivered, with a warning if these are apart."""
    text = f"--{budget['kind']} {budget['requested']:g} requested, {budget['delivered']:,.6g} delivered"
    if abs(budget["off"] or 0) > _WORTH_TELLING:
        text += f" ({budget['predicted']:,.6g} predicted)"
    if not budget["within_tolerance"]:
        text += f": {budget['off']:+.1%} off the prediction; profile again, on a quiet machine"
    return text


def summary(report: dict, output: Path) -> str:
    """What a result's ``ppf.json`` says, for people."""
    measured, parameters, guess = report["measured"], report["parameters"], report["predicted"]
    requested, spent = report["requested_ratio"], report["search_evaluations"]
    protocol = measured["protocol"]
    facts = {
        "checkpoint": output,
        "policy from": told_source(report["policy_from"], guess is None) + (f" ({spent} evaluations)" if spent else ""),
        "ratio": f"{report['delivered_ratio']:.4f} delivered" + (f", {requested} requested" * (requested is not None)),
        "parameters": f"{parameters['pruned']:,} of {parameters['dense']:,}, embeddings included",
        "perplexity": f"{measured['perplexity']:.2f} measured, {measured['dtype']} on {measured['device']}",
        "refit": report.get("refit"),
        "predicted": told_prediction(guess),
        "dense": f"{report['dense']['perplexity']:.2f}" if report["dense"] else "not measured",
        "measured on": protocol_line(protocol),
    }
    if told := report.get("elastic"):
        facts["elastic recovery"] = elastic_line(told)
    if cost := report.get("portable"):
        free = cost["unrestricted"]["perplexity"]
        facts["portable costs"] = f"{cost['cost']:+.1%} perplexity ({cost['perplexity']:.2f}, else {free:.2f})"
    if report.get("budget") and requested is None:
        facts["budget"] = budget_line(report["budget"])
    return lines(facts)
