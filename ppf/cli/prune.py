"""``ppf prune``: a physically smaller checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from .bars import policy_bars
from .console import lines, progress_bars, show
from .options import Device, Force, Json, RunFolder
from .policy import predicted

if TYPE_CHECKING:
    from ..progress import Progress
    from ..results import Choice
    from ..run import Run


def prune(
    run: RunFolder,
    output: Annotated[Path, typer.Option(metavar="OUT", help="Folder of the pruned checkpoint.")],
    ratio: Annotated[float | None, typer.Option(help="Share of the decoder's parameters to remove.")] = None,
    search: Annotated[int | None, typer.Option(metavar="N", help="Spend N true evaluations on this ratio.")] = None,
    policy: Annotated[Path | None, typer.Option(metavar="FILE", help="Your own policy, as JSON.")] = None,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a pruned checkpoint: the agent's policy, the best of a search, or your own."""
    from ..results import check_destination, deliver
    from ..run import Run

    opened = Run(run, device=device)
    check_destination(opened, output, force)
    with progress_bars() as progress:
        choice = _choose(opened, ratio, search, policy, progress)
        report = deliver(opened, choice, output, force, progress)
    show(
        as_json, {"output": str(output)} | report, summary(report, output), policy_bars(choice.policy, opened.structure)
    )


def _choose(run: Run, ratio: float | None, search: int | None, policy: Path | None, progress: Progress) -> Choice:
    from ..results import Choice, choose, read_policy

    if policy is not None:
        for name, value in (("ratio", ratio), ("search", search)):
            if value is not None:
                raise InputError(name, value, "makes no sense with --policy, which decides everything", "Drop one")
        return Choice(read_policy(policy), "given")
    if ratio is None:
        raise InputError("ratio", "(none)", "nothing says what to prune", "Give --ratio, or --policy FILE")
    return choose(run, ratio, search, progress)


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
    return lines(facts)
