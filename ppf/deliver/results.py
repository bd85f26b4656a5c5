"""From a request to a checkpoint on disk: choose a policy, write it layer by layer, measure what was written."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .. import checkpoint
from .._version import versions
from ..checkpoint.report import is_sealed, require_sealed, standing_report
from ..choose.budget import Budget, RatioBudget
from ..errors import InputError, PPFError
from ..fitting.experience import Experience
from ..fitting.perplexity import computing, log_perplexity_of
from ..fitting.run import Protocol, Run
from ..fitting.search import Search
from ..fitting.session import Session
from ..fitting.tasks import Tasks
from ..model.build import expected_tensors, pruned_config, skeleton
from ..model.decoder import Decoder
from ..model.policy import Policy
from ..progress import Progress, silent
from ..storage.files import check_output
from ..storage.schemas import read_as
from .standing import report_of, stands

REFITS = "fast", "thorough"
"""Least squares on output projections, from the library; or all kept weights too, by gradient."""


@dataclass(frozen=True)
class Choice:
    """A policy and whose it is: "agent", "calibration", "measured", "uniform", "search", "portable", or "given".

    ``budget`` is what was asked for, None for a policy given; ``evaluations`` is what a search spent, else 0;
    ``portable`` is what a portable policy costs; ``refit`` is how the kept weights are made up for what goes, one of
    :data:`REFITS`.
    """

    policy: Policy
    origin: str
    budget: Budget | None = None
    evaluations: int = 0
    portable: dict[str, Any] | None = None
    refit: str = "fast"


def choose(
    session: Session,
    ratio: float,
    search: int | None = None,
    progress: Progress = silent,
    experience: Experience | None = None,
) -> Choice:
    """The run's policy for ``ratio``, or the best one that ``search`` true evaluations find; see :func:`choose_for`.

    The search learns from ``experience`` and adds to it: the run's own, unless another store is given. Raises
    ``InputError`` for an impossible ratio, an unfinished run, or fewer than one evaluation.
    """
    return choose_for(session, RatioBudget(session.run.grid, ratio), search, progress, experience)


def choose_for(
    session: Session,
    budget: Budget,
    search: int | None = None,
    progress: Progress = silent,
    experience: Experience | None = None,
) -> Choice:
    """As :func:`choose`, for a budget in any unit. A search needs one that comes to a ratio."""
    run = session.run
    if search is None:
        found = run.answer(budget)
        return Choice(found.policy, found.source, budget)
    run.require_complete()
    if search < 1:
        raise InputError("search", search, "finds nothing without evaluations", "Use a whole number, at least 1")
    if budget.comes_to is None:
        remedy = "Leave out --search, or ask with --ratio or --memory-gb"
        raise InputError("search", search, f"is not possible for --{budget.name} yet", remedy)
    # The search refits its predictor, and breeds where it evaluates; the run keeps the predictor whose prediction is
    # reported, on the CPU, where one answer is fastest.
    predictor, agent = (copy.deepcopy(module).to(session.device) for module in (run.predictor, run.agent))
    store = run.experience if experience is None else experience
    evaluator, seed = session.evaluator(), run.settings.seed
    searcher = Search(evaluator, store, predictor, agent, budget.comes_to, seed, budget.is_limit)
    policy, _ = searcher.run(search, progress)
    return Choice(policy, "search", budget, search)


def read_policy(path: str | Path) -> Policy:
    """A policy from a JSON file, as :meth:`Policy.to_dict` writes it, alone or under "policy" as in ``ppf.json``.

    Raises ``InputError`` for anything else, and for a ``ppf.json`` that is not as it was written.
    """
    data = read_as(Any, "policy", path, "Give a JSON file with a policy, or a ppf.json")
    if isinstance(data, dict) and "policy" in data:
        if is_sealed(data):
            require_sealed(Path(path), data, 'Give its "policy" in a file of its own, or ppf.json as it was written')
        data = data["policy"]
    try:
        return Policy.from_dict(data)
    except InputError as error:
        raise InputError(error.field, error.value, f"{error.problem} (in {path})", error.remedy) from None


def check_destination(run: Run, output: str | Path, force: bool) -> None:
    """Raise ``InputError`` unless a result may be written to ``output``; replacing the run or its model is refused."""
    target = Path(output).resolve()
    for name, folder in (("run", run.path.resolve()), ("dense model", run.model_path.resolve())):
        if target == folder or target in folder.parents:
            raise InputError("output", output, f"holds the {name}", "Name a new folder")
    check_output(output, force)


def deliver(
    session: Session, choice: Choice, output: str | Path, force: bool = False, progress: Progress = silent,
    tasks: Tasks | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write ``choice`` to ``output`` layer by layer, and score what was written on the run's evaluation split.

    What was written is judged by ``tasks`` too, if there are any. Returns the report that ``ppf.json`` holds. Raises
    ``InputError`` for a policy off the grid, for an ``output`` that may not be written, and for a timed budget or tasks
    where weights stream, all before any work. An ``output`` that holds exactly this already is left as it is.
    """
    run = session.run
    run.grid.check(choice.policy)
    if not force and (found := standing(session, choice, output, tasks)) is not None:
        return found
    check_destination(run, output, force)
    source, tokenizer = checkpoint.Checkpoint(run.model_path), checkpoint.load_tokenizer(run.model_path)
    if choice.budget is not None and choice.budget.timed:
        session.permuted.require_resident(f"--{choice.budget.name}, for which the result is timed")
    check_tasks(session, tasks)
    return checkpoint.save_stream(
        pruned_config(session.permuted.config, choice.policy),
        session.pruned_tensors(choice.policy, choice.refit == "thorough", progress),
        session.permuted.dtype,
        output,
        lambda folder: _report(run, choice, tasks) | _measured(session, choice, folder, progress, tasks),
        tokenizer=tokenizer,
        generation=session.generation_config,
        force=force,
        source=source,
    )


def standing(session: Session, choice: Choice, output: str | Path, tasks: Tasks | None = None) -> dict[str, Any] | None:
    """The report of ``output`` if it holds ``choice`` of this run, measured on this kind of device, and judged by these
    ``tasks``; None otherwise."""
    found = report_of(output)
    if found is None or not isinstance(found.get("measured"), dict):
        return None
    budget, told = choice.budget, found.get("budget")
    if budget is not None:
        wanted = budget.to_dict() | {"predicted": budget.predicted(choice.policy)}
        told = {name: (told or {}).get(name) for name in wanted}
    else:
        wanted = None
    same = told == wanted and found["measured"].get("device") == str(session.device)
    return found if same and stands(output, found, _report(session.run, choice, tasks)) else None


def found_before(
    session: Session, budget: Budget | None, output: str | Path, search: int | None, portable: bool,
    refit: str = "fast",
) -> Choice | None:  # fmt: skip
    """The choice that ``output`` says to be, where finding it again would take evaluations: one of a search of so many,
    or a portable one. None if it is not, or its policy is not one that this run has measured."""
    found, run = report_of(output), session.run
    portable = portable and not run.settings.portable
    if found is None or budget is None or not (search or portable):
        return None
    try:
        policy = Policy.from_dict(found["policy"])
        run.grid.check(policy)
    except (InputError, KeyError, TypeError):
        return None
    if run.experience.lookup(policy) is None:
        return None
    return Choice(policy, "portable" if portable else "search", budget, search or 0, found.get("portable"), refit)


def check_refit(refit: str) -> None:
    """Raise ``InputError`` unless ``refit`` is one of :data:`REFITS`."""
    if refit not in REFITS:
        raise InputError("refit", refit, "is not a way to refit", f"Use one of {', '.join(REFITS)}")


def check_tasks(session: Session, tasks: Tasks | None) -> None:
    """Raise ``InputError`` unless results of ``session`` can be judged by ``tasks``."""
    if tasks is not None:
        tasks.check(session.permuted.config.max_position_embeddings, session.permuted.resident)


def _measured(
    session: Session, choice: Choice, folder: Path, progress: Progress, tasks: Tasks | None
) -> dict[str, Any]:
    """What the result itself in ``folder`` has, of which nothing is in memory any more."""
    sequences = session.run.sequences()
    if not session.permuted.resident:
        session.permuted.layers.close()  # the result's layers need the room
    resident = tasks is not None or (choice.budget is not None and choice.budget.timed)
    placement = replace(session.placement, weights="gpu") if resident else session.placement
    model = checkpoint.load_or_stream(folder, session.device, "auto", placement)
    scored = computing(model)
    value = log_perplexity_of(scored, sequences, progress, session.run.scored())
    facts = {"dtype": str(scored.dtype).removeprefix("torch."), "device": str(session.device)}
    judged = tasks and {"tasks": tasks.score(scored, checkpoint.load_tokenizer(folder), progress)}
    return (judged or {}) | {
        "parameters": {"dense": _count(session.permuted.config), "pruned": _count(model.config)},
        "budget": _spent(choice, model),
        "measured": _both(value) | facts | {"protocol": Protocol.of_run(session.run, sequences).to_dict()},
    }


def _spent(choice: Choice, model: PreTrainedModel | Decoder) -> dict[str, Any] | None:
    """What was asked for and what the result has."""
    if choice.budget is None:
        return None
    result = model if isinstance(model, PreTrainedModel) else skeleton(model.config, model.dtype)
    found = choice.budget.report(choice.policy, result)
    if choice.budget.is_limit and not choice.budget.timed and not choice.budget.is_met(found["delivered"]):
        raise PPFError(f"the result has {found['delivered']} {found['unit']}, more than {found['requested']} asked for")
    return found


def source_report(model: Path) -> dict[str, Any] | None:
    """What the ``ppf.json`` of a model says that was itself made by PPF, its own source included; None for others."""
    # Its list of files is about that folder; the fingerprint under "model" says what its weights were.
    return standing_report(model) or None


def _report(run: Run, choice: Choice, tasks: Tasks | None) -> dict[str, Any]:
    """What is known about a choice before it is materialised, and what it will be judged by."""
    dense = run.experience.lookup(run.grid.dense())
    return {
        "policy_from": choice.origin,
        "requested_ratio": choice.budget.requested_ratio if choice.budget else None,
        "delivered_ratio": run.grid.ratio(choice.policy),
        "policy": choice.policy.to_dict(),
        "search_evaluations": choice.evaluations,
        "refit": choice.refit,
        "predicted": _predicted(run, choice.policy),
        "dense": None if dense is None else _both(dense),
        "model": {
            "path": str(run.model_path),
            "fingerprint": run.manifest["fingerprint"],
            "source": run.manifest.get("source"),
        },
        "source": source_report(run.model_path),
        "structure": run.structure.to_dict(),
        "settings": run.settings.to_dict(),
        "rankings": run.manifest.get("rankings"),
        "texts": run.manifest["texts"] | {"names": run.manifest["files"]},
        "seed": run.settings.seed,
        "versions": versions(),
        "tasks_asked": None if tasks is None else {name: tasks.asked(name) for name in tasks.found},
    } | _further(run, choice)


def _further(run: Run, choice: Choice) -> dict[str, Any]:
    """What only some results have: the price of a portable policy, and the training of a run's weights."""
    portable = {} if choice.portable is None else {"portable": choice.portable}
    return portable | ({"elastic": told} if (told := run.manifest.get("elastic")) else {})


def _predicted(run: Run, policy: Policy) -> dict[str, float] | None:
    """None of a run without evaluations; without an uncertainty where that is not known."""
    if not run.has_predictor:
        return None
    found = run.predict(policy)
    return _both(float(found.mean)) | {"log_perplexity_std": float(found.std) if run.knows_uncertainty else None}


def _both(log_perplexity: float) -> dict[str, float]:
    return {"log_perplexity": log_perplexity, "perplexity": math.exp(log_perplexity)}


def _count(config: PreTrainedConfig) -> int:
    """Parameters of ``config``'s model; tied ones once."""
    return sum(shape.numel() for shape in expected_tensors(config).values())
