"""``ppf info``: what a checkpoint or a run is."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bars import policy_bars
from .console import lines, show
from .elastic import elastic_line
from .options import Json
from .reports import summary

if TYPE_CHECKING:
    from ..fitting.experience import Evaluation
    from ..fitting.run import Run
    from ..model.policy import Policy
    from ..model.structure import Structure

# A measured policy counts for a ratio if it is this near.
_NEAR = 0.02


def info(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint or a run.")], as_json: Json = False
) -> None:
    """Facts about a checkpoint (dense or pruned) or a run. Reads no weights."""
    from ..fitting.run import Run
    from ..fitting.run.manifest import is_run

    if is_run(path):
        facts = run_facts(Run(path))
        show(as_json, facts, _describe_run(facts))
        return
    facts, chart = _checkpoint_facts(path)
    show(as_json, facts, _describe_checkpoint(facts), chart)


def run_facts(run: Run) -> dict[str, Any]:
    """Settings, state and experience of a run."""
    rows = run.experience.rows()
    return {
        "kind": "run",
        "path": str(run.path),
        "state": run.manifest["state"],
        "seconds": run.manifest.get("seconds"),
        "model": run.manifest["model"],
        "from": run.manifest.get("source"),
        "elastic": run.manifest.get("elastic"),
        "fingerprint": run.manifest["fingerprint"],
        "texts": run.manifest["files"],
        "own_answers": run.manifest.get("own_answers"),
        "structure": run.structure.to_dict(),
        "settings": run.settings.to_dict(),
        "rankings": run.manifest.get("rankings"),
        "versions": run.manifest["versions"],
        "experience": {"rows": len(rows), "sources": dict(Counter(row.source for row in rows)), "best": _best(rows)},
    }


def _best(rows: list[Evaluation]) -> list[dict[str, Any]]:
    """The best measured policy near each tenth of the ratio."""
    best = []
    for tenth in range(10):
        near = [row for row in rows if abs(row.ratio - tenth / 10) <= _NEAR]
        if near:
            row = min(near, key=lambda row: row.log_perplexity)
            best.append({"near": tenth / 10, "ratio": row.ratio, "perplexity": math.exp(row.log_perplexity)})
    return best


def _describe_run(facts: dict[str, Any]) -> str:
    experience = facts["experience"]
    counts = ", ".join(f"{count} {source}" for source, count in experience["sources"].items())
    top = {name: facts[name] for name in ("path", "state", "model")}
    top |= {name.replace("_", "-"): value for name, value in facts["settings"].items()}
    if rankings := facts["rankings"]:
        top["ranking"] += f" ({_counted(rankings)})"
    if told := facts["elastic"]:
        top["elastic recovery"] = elastic_line(told)
    top["experience"] = f"{experience['rows']} measured policies ({counts})" if counts else "none yet"
    for entry in experience["best"]:
        top[f"best near {entry['near']:.0%}"] = f"perplexity {entry['perplexity']:.2f} at ratio {entry['ratio']:.4f}"
    return lines(top)


def _counted(rankings: dict[str, list[str | None]]) -> str:
    """How many sub-layers of each kind have each ranking."""
    counts = {kind: Counter(name for name in names if name) for kind, names in rankings.items()}
    told = {kind: ", ".join(f"{n} {name}" for name, n in found.most_common()) for kind, found in counts.items()}
    return "; ".join(f"{kind}: {words or 'nothing to choose'}" for kind, words in told.items())


def _checkpoint_facts(path: Path) -> tuple[dict[str, Any], str]:
    from ..checkpoint import Checkpoint, locate
    from ..checkpoint.report import read_report, saved_again
    from ..model.build import dense_structure, policy_of

    opened = Checkpoint(path)
    config, stored = opened.config, [*opened.stored.values(), *opened.passengers.values()]
    report, policy = read_report(opened.folder), policy_of(config)
    structure = _told_structure(opened.folder, report, policy) or dense_structure(config)
    facts = {
        "kind": "checkpoint",
        "path": str(path),
        "from": locate(path).source,
        "architecture": config.model_type,
        "wrapper": opened.wrapper.model_type if opened.wrapper else None,
        "notes": list(opened.notes),
        "structure": structure.to_dict(),
        "vocabulary": config.vocab_size,
        "parameters": sum(math.prod(tensor.shape) for tensor in stored),
        "bytes": sum(tensor.bytes for tensor in stored),
        "dtypes": sorted({tensor.dtype for tensor in stored}),
        "policy": policy.to_dict(),
        "report": report or None,
        "saved_again": saved_again(opened.folder, report),
    }
    return facts, policy_bars(policy, structure)


def _told_structure(folder: Path, report: dict[str, Any], policy: Policy) -> Structure | None:
    """The dense structure that a report tells, if there is one; of a model of other sizes it was not written."""
    from ..errors import InputError
    from ..families import KINDS
    from ..model.structure import Structure

    if not report.get("structure"):
        return None
    file, remedy = folder / "ppf.json", "If it is of another model, remove it: the checkpoint works without"
    try:
        found = Structure.from_dict(report["structure"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError("file", file, f"structure is not one ({type(error).__name__}: {error})", remedy) from None
    for kind in KINDS:
        units = [sublayer.units for sublayer in found.of(kind)]
        if len(units) != len(policy[kind]) or any(kept > most for kept, most in zip(policy[kind], units, strict=True)):
            raise InputError("file", file, f"its structure does not fit the {kind} of the weights", remedy)
    return found


def _describe_checkpoint(facts: dict[str, Any]) -> str:
    structure, report, path = facts["structure"], facts["report"] or {}, Path(facts["path"])
    top = {
        "architecture": facts["architecture"] + (f" inside {facts['wrapper']}" if facts["wrapper"] else ""),
        "dense structure": _sizes(structure),
        "parameters": f"{facts['parameters']:,} ({facts['bytes'] / 1e6:,.1f} MB, {', '.join(facts['dtypes'])})",
    }
    if facts["notes"]:
        top["notes"] = "; ".join(facts["notes"])
    if chain := _chain(report):
        top["made from"] = chain
    if facts["saved_again"]:
        top["out of date"] = f"{_outdated(report)}: the weights were saved again since PPF wrote them"
    elif told := summary(report, path):
        return told + "\n" + lines(top)
    return lines({"checkpoint": path} | top)


def _outdated(report: dict[str, Any]) -> str:
    """What a report says of weights that are not these any more."""
    from ..checkpoint.report import OF_WEIGHTS

    return ", ".join(["the hashes of files", *(name for name in OF_WEIGHTS if report.get(name))]) + " in ppf.json"


def _sizes(structure: dict[str, Any]) -> str:
    """A structure's sizes in words; of layers that differ, the least and the most that one has."""
    attention, ffn = structure["attention"], structure["ffn"]
    groups, channels = (sorted({units for units, *_ in rows}) for rows in (attention, ffn))
    heads = sorted({columns // structure["head_dim"] for units, _, columns, _ in attention if units})
    return (
        f"{len(ffn)} layers, hidden {structure['hidden']}, {_span(groups)} kv-groups of {_span(heads)} heads x "
        f"{structure['head_dim']}, {_span(channels)} FFN channels"
    )


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _chain(report: dict[str, Any] | None) -> str:
    """The models that a result came from, the nearest first."""
    models = []
    while isinstance(report, dict) and isinstance(report.get("model"), dict):
        models.append(str(report["model"].get("path")))
        report = report.get("source")
    return ", pruned from ".join(models)
