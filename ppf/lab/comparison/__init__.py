"""``ppf compare``: PPF and its peers on one run, one ranking, one library and one evaluator, side by side.

OUTPUT/question.json     run, report text and seed: a resumed comparison must ask the same
OUTPUT/cells/…           one method at one ratio each
OUTPUT/comparison.json   everything, OUTPUT/comparison.html the same for people
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..._version import versions
from ...checkpoint import read_config
from ...choose.budget.projection import check_ratio
from ...errors import InputError
from ...families import family_of
from ...files import write_json
from ...fitting.reader import Reader
from ...fitting.run import Protocol, Run
from ...fitting.session import Session
from ...progress import Progress, silent
from ...text import take_tokens
from .cells import Cells, compute
from .methods import ALL, Method, parse_methods, suited
from .page import comparison_page

_QUESTION = "question.json"


def compare(
    session: Session,
    text: Any,
    output: str | Path,
    methods: Sequence[Method],
    ratios: Sequence[float],
    tokens: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Compare ``methods`` at ``ratios``; perplexities are reported on ``text``, in the run's sequence length.

    Writes into ``output`` and returns what ``comparison.json`` holds. If ``output`` holds an unfinished comparison of
    the same run and text, its finished cells are kept; methods and ratios may be added. Raises ``InputError`` for
    anything wrong with the arguments, before any work: among it a ``text`` that policies were chosen on, and a method
    that the model's family, or weights that stream, do not allow (one that stands here only because of "all" is left
    out instead).
    """
    run, output = session.run, Path(output)
    for ratio in ratios:
        check_ratio(ratio, run.grid)
    length = run.settings.sequence_length
    most = None if tokens is None else max(1, tokens // length)
    reading = Reader.of(run.model_path, length).read(text, most=most)
    sequences = take_tokens(reading.sequences, tokens).long()
    protocol = Protocol.of_reading(reading, sequences, reading.part(tokens is None))
    _require_other_text(run, protocol)
    methods, left_out = suited(methods, family_of(read_config(run.model_path).model_type), session.permuted.resident)
    _ask(output, {"run": _identity(run), "protocol": protocol.to_dict(), "seed": seed})
    cells = compute(Cells(session, sequences, output / "cells", seed), methods, ratios, progress)
    data = _summary(session, protocol, seed, ratios, cells) | {"left_out": left_out}
    write_json(output / "comparison.json", data)
    comparison_page(data).write(output / "comparison.html")
    return data


def _identity(run: Run) -> dict[str, Any]:
    """What makes two runs the same for a comparison."""
    fields = "fingerprint", "settings", "texts"
    return {name: run.manifest[name] for name in fields} | {"path": str(run.path.resolve())}


def _require_other_text(run: Run, protocol: Protocol) -> None:
    if protocol.sha256 in (run.manifest["texts"]["text"], run.manifest["texts"]["eval_text"]):
        remedy = "Give a text that the run has not seen"
        raise InputError("text", protocol.text, "is what the run calibrated or chose policies on", remedy)


def _ask(output: Path, question: dict[str, Any]) -> None:
    """Make ``output`` the folder of ``question``, or check that it is."""
    file = output / _QUESTION
    if file.exists():
        if json.loads(file.read_text(encoding="utf-8")) != question:
            raise InputError("output", output, "is a comparison of another run, text or seed", "Name a new folder")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("output", output, "exists, is not empty and is not a comparison", "Name a new folder")
    (output / "cells").mkdir(parents=True, exist_ok=True)
    write_json(file, question)


def _summary(
    session: Session, protocol: Protocol, seed: int, ratios: Sequence[float], cells: list[dict[str, Any]]
) -> dict[str, Any]:
    run, device = session.run, session.device
    searched = Protocol.of_run(run, run.sequences())
    return {
        "run": str(run.path),
        "model": run.manifest["model"],
        "ranking": run.settings.ranking,
        "run_evaluations": run.settings.evaluations,
        "protocol": protocol.to_dict(),
        "search_protocol": searched.to_dict(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "seed": seed,
        "versions": versions(),
        "ratios": list(ratios),
        "cells": cells,
        "reductions": _reductions(cells),
    }


def _reductions(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """For each of PPF's rows, by what share its perplexity is below each peer's: the least and the most over all."""
    found = {}
    for label in dict.fromkeys(cell["label"] for cell in cells if cell["ours"]):
        ours = {cell["requested_ratio"]: cell["perplexity"] for cell in cells if cell["label"] == label}
        against = [
            {
                "peer": cell["label"],
                "ratio": cell["requested_ratio"],
                "reduction": 1 - ours[cell["requested_ratio"]] / cell["perplexity"],
            }
            for cell in cells
            if not cell["ours"] and cell["requested_ratio"] in ours
        ]
        if against:
            ordered = sorted(against, key=lambda entry: entry["reduction"])
            found[label] = {"least": ordered[0], "most": ordered[-1], "all": against}
    return found


__all__ = ["ALL", "Method", "compare", "parse_methods"]
