"""From a pruned checkpoint to a recovered one: check everything, train, measure before and after, write."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ... import checkpoint
from ..._version import versions
from ...checkpoint.checks import REPORT, existing_folder
from ...checkpoint.hashes import sha256_of
from ...checkpoint.headers import read_json
from ...checkpoint.writing import model_bytes
from ...errors import InputError
from ...files import check_output, require_space
from ...fitting.evaluation.scoring import in_compute_dtype, model_log_perplexity
from ...fitting.reader import Reader
from ...fitting.run import Protocol
from ...progress import Progress, silent
from .corpus import Corpus
from .methods import Student, require_installed
from .objective import Objective
from .settings import RecoverySettings
from .state import Unfinished
from .teacher import find_teacher
from .training import Training

# What a report says of the pruned checkpoint's own perplexity; it moves under "recovery", for it holds no longer.
_OF_THE_PRUNED = ("measured", "predicted", "dense")


def recover(
    pruned: str | Path,
    text: str | Path,
    output: str | Path,
    *,
    settings: RecoverySettings | None = None,
    teacher: str | Path | None = None,
    device: str = "auto",
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train the checkpoint ``pruned`` on ``text`` and write the result, in the same format, to ``output``.

    The teacher is the dense model that ``ppf.json`` names, or ``teacher``; with ``settings.distillation`` 0 there is
    none. The last 5 % of the text (at most 16,384 tokens) are not trained on: perplexity before and after is measured
    there. While it runs, ``output`` + ".unfinished" holds its state; the same call goes on with it after Ctrl-C or a
    kill, with the same result on a CPU. Returns the report that ``ppf.json`` holds. Raises ``InputError`` for anything
    wrong with the arguments, before any work, and ``PPFError`` if the training diverges.
    """
    job = _check(Path(pruned), text, Path(output), settings or RecoverySettings(), teacher, device, force)
    corpus = Corpus.of(job.reader.sequences(job.text))
    model = checkpoint.load(job.pruned, device=str(job.device))
    dense = None if job.teacher is None else checkpoint.load(job.teacher, device=str(job.device))
    before = _measure(model, corpus, progress)
    dense_measured = None if dense is None else _measure(dense, corpus, progress)
    student = Student(model, job.settings)
    _require_space(job.output, student)
    job.unfinished.begin()
    started = time.perf_counter()
    losses = _train(student, corpus, dense, job, progress)
    seconds = time.perf_counter() - started
    recovered = student.merged()
    after = _measure(recovered, corpus, progress)
    report = _report(job, corpus, (before, after, dense_measured), losses, seconds)
    source = checkpoint.Checkpoint(job.pruned)
    checkpoint.save(recovered, job.reader.tokenizer, job.output, report, force, source)
    job.unfinished.remove()
    return report


@dataclass(frozen=True)
class _Job:
    pruned: Path
    text: Path
    output: Path
    settings: RecoverySettings
    teacher: Path | None
    device: torch.device
    report: dict[str, Any]
    unfinished: Unfinished
    reader: Reader


def _check(
    pruned: Path,
    text: str | Path,
    output: Path,
    settings: RecoverySettings,
    teacher: str | Path | None,
    device: str,
    force: bool,
) -> _Job:
    """Everything that can be refused without reading weights."""
    target = checkpoint.resolve_device(device)
    reader = Reader.of(existing_folder(pruned), settings.sequence_length)
    require_installed(settings.method)
    report = read_json(pruned / REPORT) if (pruned / REPORT).exists() else {}
    folder = find_teacher(pruned, report, teacher, settings.distillation)
    _check_destination(output, force, {"checkpoint": pruned, "teacher": folder})
    _require_file(text)
    question = {
        "checkpoint": checkpoint.fingerprint(pruned),
        "text": sha256_of(Path(text)),
        "teacher": None if folder is None else checkpoint.fingerprint(folder),
        "settings": settings.to_dict(),
        "device": target.type,
    }
    return _Job(pruned, Path(text), output, settings, folder, target, report, Unfinished(output, question), reader)


def _check_destination(output: Path, force: bool, inputs: dict[str, Path | None]) -> None:
    target = output.resolve()
    for name, folder in inputs.items():
        if folder is not None and (target == folder.resolve() or target in folder.resolve().parents):
            raise InputError("output", output, f"holds the {name}", "Name a new folder")
    check_output(output, force)


def _require_file(text: str | Path) -> None:
    if not Path(text).is_file():
        raise InputError("text", text, "is not a file", "Give a UTF-8 text file")


def _require_space(output: Path, student: Student) -> None:
    trained = sum(parameter.numel() for parameter in student.trained.values())
    # The state (weight and two moments in fp32) exists twice while it is replaced.
    require_space(output, model_bytes(student.model) + 2 * 12 * trained)


def _train(
    student: Student, corpus: Corpus, dense: PreTrainedModel | None, job: _Job, progress: Progress
) -> list[float]:
    objective = Objective(dense, job.settings.distillation)
    return Training(student, corpus, objective, job.settings, job.unfinished).run(progress)


def _measure(model: PreTrainedModel, corpus: Corpus, progress: Progress) -> dict[str, Any]:
    """Perplexity on the part of the text that is not trained on."""
    scored = in_compute_dtype(model)
    value = model_log_perplexity(scored, corpus.held_out, progress)
    return {
        "log_perplexity": value,
        "perplexity": math.exp(value),
        "dtype": str(scored.dtype).removeprefix("torch."),
        "device": str(scored.device),
    }


def _report(
    job: _Job, corpus: Corpus, measured: tuple[dict, dict, dict | None], losses: list[float], seconds: float
) -> dict[str, Any]:
    """The pruned checkpoint's report, extended: "measured" and "dense" are now those of the held-out part."""
    before, after, dense = measured
    protocol = Protocol.of_file(job.text, corpus.held_out, "last 5 %, not trained on", job.reader.begin).to_dict()
    settings = job.settings
    recovery = {
        "from": str(job.pruned.resolve()),
        "settings": settings.to_dict(),
        "teacher": None if job.teacher is None else str(job.teacher.resolve()),
        "text": {"path": protocol["text"], "sha256": protocol["sha256"], "training_tokens": corpus.training.numel()},
        "steps": settings.steps,
        "tokens": settings.steps * settings.batch * settings.sequence_length,
        "before": before,
        "loss": _ends(losses),
        "seconds": seconds,
        "pruned": {name: job.report.get(name) for name in _OF_THE_PRUNED},
        "earlier": job.report.get("recovery"),
        "versions": versions(),
    }
    kept = {name: value for name, value in job.report.items() if name not in (*_OF_THE_PRUNED, "files")}
    return kept | {"measured": after | {"protocol": protocol}, "predicted": None, "dense": dense, "recovery": recovery}


def _ends(losses: list[float]) -> dict[str, float]:
    """Mean loss of the first and of the last twentieth of the steps, in nats a token."""
    count = max(1, len(losses) // 20)
    return {"first": sum(losses[:count]) / count, "last": sum(losses[-count:]) / count}
