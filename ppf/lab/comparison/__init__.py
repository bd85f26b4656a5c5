"""``ppf compare``: PPF and its peers on one run, one ranking, one library and one evaluator, side by side.

OUTPUT/question.json     run, report text and seed: a resumed comparison must ask the same
OUTPUT/cells/…           one method at one ratio each
OUTPUT/tasks/…           what tasks say of it, and of the dense model, if they were asked
OUTPUT/comparison.json   everything, OUTPUT/comparison.html the same for people
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..._version import versions
from ...checkpoint import read_config
from ...choose.budget.projection import check_ratio
from ...deliver.results import check_tasks
from ...errors import InputError, shown
from ...families import family_of
from ...fitting.reader import Reader
from ...fitting.run import Protocol, Run
from ...fitting.session import Session
from ...fitting.tasks import Tasks
from ...progress import Progress, silent
from ...storage.checksums import checksum
from ...storage.files import write_json
from ...storage.leftovers import is_temporary_of
from ...storage.locks import is_lock, locked_folder, sweep
from ...storage.sealed import Sealed
from ...text import take_tokens
from .cells import Cells, compute
from .judging import Judge
from .methods import ALL, Method, parse_methods, suited
from .page import comparison_page

_QUESTION = "question.json"
_FILES = "comparison.json", "comparison.html"


def compare(
    session: Session,
    text: Any,
    output: str | Path,
    methods: Sequence[Method],
    ratios: Sequence[float],
    tokens: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    tasks: Tasks | None = None,
) -> dict[str, Any]:
    """Compare ``methods`` at ``ratios``; perplexities are reported on ``text``, in the run's sequence length,
    and every model is judged by ``tasks`` if there are any.

    Writes into ``output`` and returns what ``comparison.json`` holds. If ``output`` holds an unfinished comparison of
    the same run and text, its finished cells are kept; methods, ratios and tasks may be added. Raises ``InputError``
    for anything wrong with the arguments, before any work: among it a ``text`` that policies were chosen on, and a
    method that the model's family, or weights that stream, do not allow (one that stands here only because of "all" is
    left out instead).
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
    check_tasks(session, tasks)
    methods, left_out = suited(methods, family_of(read_config(run.model_path).model_type), session.permuted.resident)
    with locked_folder(output):
        question = {"run": _identity(run), "protocol": protocol.to_dict(), "seed": seed}
        _ask(output, question)
        computing = Cells(session, sequences, _answers(output / "cells", question), seed)
        cells, judged = compute(computing, methods, ratios, progress), {}
        if tasks is not None:
            judge = Judge(session, lambda: computing.statistics.moments, tasks, _answers(output / "tasks", question))
            judged, cells = {"dense_tasks": judge.dense(progress)}, judge.cells(cells, progress)
        data = _summary(session, protocol, seed, ratios, cells) | {"left_out": left_out} | judged
        if not _stands(output, data):
            write_json(output / _FILES[0], data)
            comparison_page(data).write(output / _FILES[1])
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
    """Make ``output`` the folder of ``question``, or check that it is; what killed ones left in it is swept."""
    file = Sealed(output, "", "output", "Name a new folder")
    if file.exists(_QUESTION):
        if file.read_json(_QUESTION, dict[str, Any]) != question:
            raise InputError("output", output, "is a comparison of another run, text or seed", "Name a new folder")
    elif not all(is_lock(name) or is_temporary_of(name, _QUESTION) for name in os.listdir(output)):
        raise InputError("output", output, "exists, is not empty and is not a comparison", "Name a new folder")
    sweep(output)
    file.write_json(_QUESTION, question)  # first: nothing but it says whose the folder is
    (output / "cells").mkdir(exist_ok=True)


def _answers(folder: Path, question: dict[str, Any]) -> Sealed:
    """The files of a folder, which are answers to one question."""
    owner = checksum(json.dumps(question, sort_keys=True))
    return Sealed(folder, owner, "output", "Remove this file: what it held is found again")


def _stands(output: Path, data: dict[str, Any]) -> bool:
    """True, with a warning that says so, if ``output`` holds all of ``data`` already."""
    try:
        said = json.loads((output / _FILES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if said != json.loads(json.dumps(data)) or not (output / _FILES[1]).exists():
        return False
    warnings.warn(f"ppf: {shown(output)} holds exactly this already: nothing was written", stacklevel=3)
    return True


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
