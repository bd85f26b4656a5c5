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
    from ..checkpoint.checks import REPORT, existing_folder, read_config, stored_tensors
    from ..checkpoint.headers import read_json
    from ..model import policy_of
    from ..model.structure import Structure

    config = read_config(existing_folder(path))
    stored = stored_tensors(path, config).values()
    report = read_json(path / REPORT) if (path / REPORT).exists() else None
    policy = policy_of(config)
    structure = Structure(**report["structure"]) if report and "structure" in report else Structure.from_config(config)
    facts = {
        "kind": "checkpoint",
        "path": str(path),
        "architecture": config.model_type,
        "structure": structure.to_dict(),
        "vocabulary": config.vocab_size,
        "parameters": sum(math.prod(tensor.shape) for tensor in stored),
        "bytes": sum(tensor.bytes for tensor in stored),
        "dtypes": sorted({tensor.dtype for tensor in stored}),
        "policy": {"attention": list(policy.attention), "ffn": list(policy.ffn)},
        "report": report,
    }
    return facts, policy_bars(policy, structure)


def _describe_checkpoint(facts: dict[str, Any]) -> str:
    s, report = facts["structure"], facts["report"]
    top = {
        "architecture": facts["architecture"],
        "dense structure": f"{s['layers']} layers, hidden {s['hidden']}, {s['kv_groups']} kv-groups of "
        f"{s['heads_per_group']} heads x {s['head_dim']}, {s['channels']} FFN channels",
        "parameters": f"{facts['parameters']:,} ({facts['bytes'] / 1e6:,.1f} MB, {', '.join(facts['dtypes'])})",
    }
    if report and "recovery" in report:
        from .recover import summary

        return summary(report, Path(facts["path"])) + "\n" + lines(top)
    if report and "measured" in report:
        from .prune import summary

        return summary(report, Path(facts["path"])) + "\n" + lines(top)
    return lines({"checkpoint": facts["path"]} | top)
