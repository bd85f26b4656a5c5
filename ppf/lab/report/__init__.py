"""The report card of a run's predictor: how good it is where it is hard, within a ratio, on policies it never saw."""

from __future__ import annotations

import copy
import math
import statistics
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._version import versions
from ...choose.predictor import Predictor, predictor_named
from ...errors import InputError
from ...fitting.alone import may_write
from ...fitting.experience import Experience
from ...fitting.run import Protocol, Run
from ...fitting.session import Session
from ...model.policy import Policy
from ...progress import Progress, silent
from ...storage.files import write_json
from ...storage.locks import locked_folder, sweep
from . import baselines
from .heldout import STORE, HeldOut, held_out_policies, held_out_store, measure_all, training_rows
from .latency import latency
from .learning import Study, learning_curve, rivals

RATIOS = (0.2, 0.3, 0.4, 0.5)
# Rank correlations of fewer policies say little, and the ten best of them less.
SMALLEST = 20
_FILES = "report.json", "report.html"


def report(
    session: Session,
    output: str | Path | None = None,
    held_out: int = 200,
    kinds: tuple[str, ...] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure ``held_out`` random and half as many visited policies at each ratio, score the run's predictor on them.

    Other ``kinds`` of predictor are trained for comparison, beside the baselines. Writes ``report.json`` and
    ``report.html`` into ``output`` (default: the run's folder) and returns what the first holds. Measurements are kept
    in the run, or in ``output`` if nothing may be written into the run: a killed report resumes, a second one measures
    nothing. Raises ``InputError`` for an unfinished run, fewer than 20 policies, more than the model has, and unknown
    kinds.
    """
    run = session.run
    run.require_complete()
    if held_out < SMALLEST:
        raise InputError("held-out", held_out, "is too few for a rank correlation", f"Use at least {SMALLEST}")
    for kind in kinds:
        predictor_named(kind)
    ratios = [ratio for ratio in RATIOS if ratio <= run.grid.maximum_ratio]
    folder = Path(output) if output is not None else run.path
    kept = run.path if may_write(run.path) else folder
    with locked_folder(kept, "run" if kept == run.path else "output"), locked_folder(folder):
        for place in (kept, folder):
            sweep(place, STORE, *_FILES)
        policies = held_out_policies(run, ratios, held_out)
        with closing(held_out_store(run, kept)) as store:
            data = _measure_and_score(session, store, policies, ratios, kinds, progress)
        from .page import report_page  # matplotlib takes a second to import

        write_json(folder / _FILES[0], data)
        report_page(data).write(folder / _FILES[1])
    return data


def _measure_and_score(
    session: Session,
    store: Experience,
    policies: dict[str, list[list[Policy]]],
    ratios: list[float],
    kinds: tuple[str, ...],
    progress: Progress,
) -> dict[str, Any]:
    run, device = session.run, session.device
    evaluator = session.evaluator()
    held = {group: measure_all(evaluator, store, parts, group, progress) for group, parts in policies.items()}
    alone = measure_all(evaluator, store, [baselines.single_policies(run.grid)], "single", progress).truth.tolist()
    # The store remembers what the first measurement took; reading it again must not count as an evaluation's time.
    seconds = statistics.median(row.seconds for row in store.rows() if row.source == "random")
    table, dense = baselines.sensitivity(run.grid, alone), alone[-1]
    study = Study(run.grid, *_training_data(run), held, ratios, device, run.settings.seed)
    own = run.settings.predictor
    compared = rivals(study, [kind for kind in kinds if kind != own], table, dense, run.predictor, progress)
    curve = learning_curve(study, own, progress)
    predictor = copy.deepcopy(run.predictor).to(device)  # the run's own stays where it answers
    return _facts(session, len(study.levels), ratios) | {
        "scores": study.score(predictor),
        "rivals": compared,
        "curve": curve,
        "latency": latency(predictor, seconds),
        "dense_log_perplexity": dense,
        "sensitivity": [[None if math.isnan(value) else value for value in row] for row in table.tolist()],
        "points": {group: _points(predictor, part) for group, part in held.items()},
    }


def _facts(session: Session, rows: int, ratios: list[float]) -> dict[str, Any]:
    run, device = session.run, session.device
    return {
        "run": str(run.path),
        "model": run.manifest["model"],
        "kind": run.settings.predictor,
        "evaluations": rows,
        "ratios": ratios,
        "layers": run.structure.layers,
        "protocol": Protocol.of_run(run, run.sequences()).to_dict(),
        "xgboost": baselines.has_xgboost(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
    }


def _training_data(run: Run) -> tuple[Tensor, Tensor]:
    rows = training_rows(run)
    values = torch.tensor([row.log_perplexity for row in rows], dtype=torch.float64)
    return run.grid.encode([row.policy for row in rows]), values


def _points(predictor: Predictor, held: HeldOut) -> dict[str, list[float]]:
    """Every held-out policy's index of ratio, truth, prediction and standard uncertainty."""
    found = predictor(held.levels)
    return {
        "ratio": held.ratio.tolist(),
        "truth": held.truth.tolist(),
        "mean": found.mean.tolist(),
        "std": found.std.tolist(),
    }
