"""From a request to a checkpoint on disk: choose a policy, materialise it, measure the result itself, write it."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import checkpoint
from .._version import versions
from ..choose.budget import Budget
from ..choose.budget.projection import check_ratio
from ..errors import InputError
from ..files import check_output
from ..fitting.evaluation.scoring import in_compute_dtype, model_log_perplexity
from ..fitting.experience import Experience
from ..fitting.run import Protocol, Run
from ..fitting.search import Search
from ..model.policy import Policy
from ..progress import Progress, silent
from .request import answer, verified


@dataclass(frozen=True)
class Choice:
    """A policy and where it comes from: "agent", "search", "portable", "given" by the user, or "uniform".

    ``requested_ratio`` is None unless a ratio was asked for; ``evaluations`` is what a search spent, else 0;
    ``portable`` is what a portable policy costs; ``budget`` is what was asked for in another unit than a ratio.
    """

    policy: Policy
    source: str
    requested_ratio: float | None = None
    evaluations: int = 0
    portable: dict[str, Any] | None = None
    budget: Budget | None = None


def choose(
    run: Run,
    ratio: float,
    search: int | None = None,
    progress: Progress = silent,
    experience: Experience | None = None,
) -> Choice:
    """The agent's policy for ``ratio``, or the best one that ``search`` true evaluations find.

    The search learns from ``experience`` and adds to it: the run's own, unless another store is given. Raises
    ``InputError`` for an impossible ratio, an unfinished run, or fewer than one evaluation.
    """
    answer = run.policy(ratio)
    if search is None:
        return Choice(answer.policy, "agent", ratio)
    if search < 1:
        raise InputError("search", search, "finds nothing without evaluations", "Use a whole number, at least 1")
    # The search refits its predictor, and breeds where it evaluates; the run keeps the predictor whose prediction is
    # reported, on the CPU, where one answer is fastest.
    predictor, agent = (copy.deepcopy(module).to(run.device) for module in (run.predictor, run.agent))
    searcher = Search(run.evaluator(), experience or run.experience, predictor, agent, ratio, run.settings.seed)
    policy, _ = searcher.run(search, progress)
    return Choice(policy, "search", ratio, search)


def choose_for(run: Run, budget: Budget, search: int | None = None, progress: Progress = silent) -> Choice:
    """As :func:`choose`, for a budget in any unit. A search needs one that is a ratio, or comes to one: memory."""
    if budget.kind == "ratio":
        return choose(run, budget.requested, search, progress)
    if search is None:
        return Choice(answer(run, budget).policy, "agent", budget=budget)
    if budget.kind != "memory-gb":
        remedy = "Leave out --search, or ask with --ratio or --memory-gb"
        raise InputError("search", search, f"is not possible for --{budget.kind} yet", remedy)
    found = choose(run, 1 - budget.kept, search, progress)
    return replace(found, requested_ratio=None, budget=budget)


def read_policy(path: str | Path) -> Policy:
    """A policy from a JSON file: ``{"attention": [...], "ffn": [...]}``, alone or under "policy" as in ``ppf.json``.

    Raises ``InputError`` for anything else.
    """
    remedy = 'Write {"attention": [kv-groups of each layer], "ffn": [channels of each layer]}'
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(data, dict) and "policy" in data:
            data = data["policy"]
        return Policy.from_json(json.dumps(data))
    except OSError as error:
        raise InputError("policy", path, f"cannot be read ({error.strerror})", remedy) from None
    except (ValueError, RecursionError) as error:
        raise InputError("policy", path, f"is not a policy ({error})", remedy) from None


def check_destination(run: Run, output: str | Path, force: bool) -> None:
    """Raise ``InputError`` unless a result may be written to ``output``; replacing the run or its model is refused."""
    target = Path(output).resolve()
    for name, folder in (("run", run.path.resolve()), ("dense model", run.model_path.resolve())):
        if target == folder or target in folder.parents:
            raise InputError("output", output, f"holds the {name}", "Name a new folder")
    check_output(output, force)


def deliver(run: Run, choice: Choice, output: str | Path, force: bool = False, progress: Progress = silent) -> dict:
    """Materialise ``choice``, score the model itself on the run's evaluation split, write ``output``.

    Returns the report that ``ppf.json`` holds. Raises ``InputError`` for a policy off the grid and for an ``output``
    that may not be written, both before any work.
    """
    run.grid.check(choice.policy)
    check_destination(run, output, force)
    tokenizer = checkpoint.load_tokenizer(run.model_path)
    model, sequences = run.materialize(choice.policy), run.sequences()
    scored = in_compute_dtype(model)
    measured = model_log_perplexity(scored, sequences, progress)
    facts = {"dtype": _name(scored.dtype), "device": str(run.device)}
    report = _report(run, choice) | {
        "parameters": {"dense": run.dense.num_parameters(), "pruned": model.num_parameters()},
        "budget": verified(run, choice.budget, choice.policy, model) if choice.budget else None,
        "measured": _both(measured) | facts | {"protocol": Protocol.of_run(run, sequences).to_dict()},
    }
    if choice.portable is not None:
        report["portable"] = choice.portable
    checkpoint.save(model, tokenizer, output, report, force)
    return report


def _report(run: Run, choice: Choice) -> dict[str, Any]:
    """What is known about a choice before it is materialised."""
    prediction, dense = run.predict(choice.policy), run.experience.lookup(run.grid.dense())
    if choice.requested_ratio is not None:
        check_ratio(choice.requested_ratio, run.grid)
    return {
        "source": choice.source,
        "requested_ratio": choice.requested_ratio,
        "delivered_ratio": run.grid.ratio(choice.policy),
        "policy": {"attention": list(choice.policy.attention), "ffn": list(choice.policy.ffn)},
        "search_evaluations": choice.evaluations,
        "predicted": _both(float(prediction.mean)) | {"log_perplexity_std": float(prediction.std)},
        "dense": None if dense is None else _both(dense),
        "model": {"path": str(run.model_path), "fingerprint": run.manifest["fingerprint"]},
        "structure": run.structure.to_dict(),
        "settings": run.settings.to_dict(),
        "texts": run.manifest["texts"] | {"names": run.manifest["files"]},
        "seed": run.settings.seed,
        "versions": versions(),
    }


def _both(log_perplexity: float) -> dict[str, float]:
    return {"log_perplexity": log_perplexity, "perplexity": math.exp(log_perplexity)}


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
