"""``ppf info``: what a checkpoint or a run is."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .bars import policy_bars
from .console import lines, show
from .options import Json

if TYPE_CHECKING:
    from ..fitting.experience import Evaluation
    from ..fitting.run import Run

# A measured policy counts for a ratio if it is this near.
_NEAR = 0.02


def info(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint or a run.")], as_json: Json = False
) -> None:
    """Facts about a checkpoint (dense or pruned) or a run. Reads no weights."""
    from ..fitting.run import Run
    from ..fitting.run.directory import MANIFEST

    if (path / MANIFEST).exists():
        facts = run_facts(Run(path))
        show(as_json, facts, _describe_run(facts))
        return
    facts, chart = _checkpoint_facts(path)
    show(as_json, facts, _describe_checkpoint(facts), chart)


def run_facts(run: Run) -> dict[str, Any]:
    """Settings, state and experience of a run."""
    started = (run.path / "experience.sqlite").exists()  # asking must not make one
    rows = run.experience.rows() if started else []
    return {
        "kind": "run",
        "path": str(run.path),
        "state": run.manifest["state"],
        "seconds": run.manifest.get("seconds"),
        "model": run.manifest["model"],
        "from": run.manifest.get("source"),
        "fingerprint": run.manifest["fingerprint"],
        "texts": run.manifest["files"],
        "structure": run.structure.to_dict(),
        "settings": run.settings.to_dict(),
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
    top["experience"] = f"{experience['rows']} measured policies ({counts})" if counts else "none yet"
    for entry in experience["best"]:
        top[f"best near {entry['near']:.0%}"] = f"perplexity {entry['perplexity']:.2f} at ratio {entry['ratio']:.4f}"
    return lines(top)


def _checkpoint_facts(path: Path) -> tuple[dict[str, Any], str]:
    from ..checkpoint import Checkpoint, locate
    from ..checkpoint.headers import REPORT, read_json
    from ..model.build import policy_of
    from ..model.geometry import structure_of
    from ..model.structure import Structure

    opened = Checkpoint(path)
    config, stored = opened.config, [*opened.stored.values(), *opened.passengers.values()]
    report = read_json(opened.folder / REPORT) if (opened.folder / REPORT).exists() else None
    policy = policy_of(config)
    if report and "structure" in report:
        structure = Structure.from_dict(report["structure"])
    else:
        structure = structure_of(opened.family, config)
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
        "report": report,
    }
    return facts, policy_bars(policy, structure)


def _describe_checkpoint(facts: dict[str, Any]) -> str:
    structure, report = facts["structure"], facts["report"]
    top = {
        "architecture": facts["architecture"] + (f" inside {facts['wrapper']}" if facts["wrapper"] else ""),
        "dense structure": _sizes(structure),
        "parameters": f"{facts['parameters']:,} ({facts['bytes'] / 1e6:,.1f} MB, {', '.join(facts['dtypes'])})",
    }
    if facts["notes"]:
        top["notes"] = "; ".join(facts["notes"])
    if chain := _chain(report):
        top["made from"] = chain
    if report and "recovery" in report:
        from .recover import summary

        return summary(report, Path(facts["path"])) + "\n" + lines(top)
    if report and "measured" in report:
        from .prune import summary

        return summary(report, Path(facts["path"])) + "\n" + lines(top)
    return lines({"checkpoint": facts["path"]} | top)


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
