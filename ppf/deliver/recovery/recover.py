"""From a pruned checkpoint to a recovered one: check everything, train, measure before and after, write."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ... import checkpoint, memory, ranks
from ..._version import versions
from ...checkpoint.report import standing_report
from ...checkpoint.writing import model_bytes
from ...errors import InputError
from ...fitting.evaluation.scoring import in_compute_dtype, model_log_perplexity
from ...fitting.reader import Reader, Reading
from ...fitting.run import Protocol
from ...fitting.run.manifest import is_run
from ...model.stream import Placement
from ...progress import Progress, logged, silent
from ...storage.files import check_output, require_space
from ...storage.locks import for_all, locked_result, waiting
from ...timings import timed
from ..standing import report_of, stands
from .corpus import Corpus
from .methods import Student, require_installed
from .settings import RecoverySettings
from .state import Unfinished
from .teacher import find_teacher
from .teaching import Teacher, load_teacher
from .training import Training

# What a report says of the pruned checkpoint's own perplexity; it moves under "recovery", for it holds no longer.
_OF_THE_PRUNED = ("measured", "predicted", "dense")


def recover(
    pruned: str | Path,
    text: Any,
    output: str | Path,
    *,
    settings: RecoverySettings | None = None,
    teacher: str | Path | None = None,
    device: str = "auto",
    placement: Placement | None = None,
    force: bool = False,
    progress: Progress = silent,
    wait: bool = False,
) -> dict[str, Any]:
    """Train the checkpoint ``pruned`` on ``text`` and write the result, in the same format, to ``output``.

    The teacher is the dense model that ``ppf.json`` names, or ``teacher``; with ``settings.distillation`` 0 there is
    none. ``placement`` says where its weights are kept. The last 5 % of the text (at most 16,384 tokens) are not
    trained on: perplexity before and after is measured there. While it runs, ``output`` + ".unfinished" holds its
    state; the same call goes on with it after Ctrl-C or a kill, with the same result on a CPU.

    Under torchrun, after :func:`ppf.ranks.start`, all processes make the same call, and each holds a share of the
    weights and trains on a share of every batch; any number of them may go on with what any other began. Returns the
    report that ``ppf.json`` holds; an ``output`` that has this result already is left as it is, unless ``force``, with
    a warning. Raises ``InputError`` for anything wrong with the arguments, before any work, and while another process
    writes ``output``, unless that is to ``wait``; and ``PPFError`` if the training diverges.
    """
    settings, placement = settings or RecoverySettings(), placement or Placement()
    if is_run(Path(pruned)):
        remedy = "Add --elastic to train all its sizes, or prune it first and recover the result"
        raise InputError("model", pruned, "is a run, not a checkpoint", remedy)
    pruned = checkpoint.local_folder(pruned)  # in every process: each may have a cache of its own
    if teacher is not None and settings.distillation > 0:
        teacher = checkpoint.local_folder(teacher)
    with waiting(wait), for_all(lambda: locked_result(output)):
        job = ranks.from_first(lambda: _check(pruned, text, Path(output), settings, teacher, device, force))
        return job if isinstance(job, dict) else _recover(job, placement, force, progress)


def _recover(job: _Job, placement: Placement, force: bool, progress: Progress) -> dict[str, Any]:
    job = replace(job, device=ranks.device(job.device))
    memory.bound(job.device, placement.gpu_memory)
    progress = logged(progress if ranks.first() else silent)
    corpus = Corpus.of(job.reading.sequences.long())
    with ranks.together():
        student, before = _begin(job, corpus, progress)
        dense, losses, seconds = _train(student, corpus, job, placement, progress)

    def end() -> dict[str, Any]:
        recovered = _end(student, job)
        after = _measure(recovered, corpus, progress)
        report = _report(job, corpus, (before, after, dense), losses, seconds)
        checkpoint.save(recovered, job.reader.tokenizer, job.output, report, force, checkpoint.Checkpoint(job.pruned))
        job.unfinished.remove()
        return report

    return ranks.from_first(end)


@dataclass(frozen=True)
class _Job:
    pruned: Path
    reading: Reading
    output: Path
    settings: RecoverySettings
    teacher: Path | None
    device: torch.device
    report: dict[str, Any]
    unfinished: Unfinished
    reader: Reader


def _check(
    pruned: Path,
    text: Any,
    output: Path,
    settings: RecoverySettings,
    teacher: str | Path | None,
    device: str,
    force: bool,
) -> _Job | dict[str, Any]:
    """Everything that can be refused without reading weights; the report of an output that is this result already."""
    target = checkpoint.resolve_device(device)
    reader = Reader.of(pruned, settings.sequence_length)
    require_installed(settings.method)
    report = standing_report(pruned)
    folder = find_teacher(pruned, report, teacher, settings.distillation)
    there = None if force else _recovered(output)
    _check_destination(output, force, {"checkpoint": pruned, "teacher": folder}, there is not None)
    reading = reader.read(text, most=Corpus.needed(settings.steps * settings.batch))
    question = {
        "checkpoint": checkpoint.fingerprint(pruned),
        "text": reading.sha256 if reading.read_as is None else reading.read_as | {"sha256": reading.sha256},
        "teacher": None if folder is None else checkpoint.fingerprint(folder),
        "settings": deciding(settings),
        "device": target.type,
    }
    if there is not None:
        if not stands(output, there["recovery"], {"question": question, "versions": versions()}):
            check_output(output)  # which refuses it
        Unfinished.remove_of(output, question)
        return there
    if (other := _recovered(output)) is not None and other["recovery"]["question"] != question:
        Unfinished.remove_of(output, other["recovery"]["question"])
    return _Job(pruned, reading, output, settings, folder, target, report, Unfinished(output, question), reader)


def _recovered(output: Path) -> dict[str, Any] | None:
    """The report of ``output`` if that is a recovered checkpoint that says of what."""
    found = report_of(output)
    recovery = found and found.get("recovery")
    return found if isinstance(recovery, dict) and isinstance(recovery.get("question"), dict) else None


def deciding(settings: RecoverySettings) -> dict[str, Any]:
    """What the result depends on: any number of tokens at once gives the same but for rounding."""
    return {name: value for name, value in settings.to_dict().items() if name != "micro_tokens"}


def _check_destination(output: Path, force: bool, inputs: dict[str, Path | None], may_stand: bool) -> None:
    target = output.resolve()
    for name, folder in inputs.items():
        if folder is not None and (target == folder.resolve() or target in folder.resolve().parents):
            raise InputError("output", output, f"holds the {name}", "Name a new folder")
    if not may_stand:
        check_output(output, force)


@timed("reading weights")
def _begin(job: _Job, corpus: Corpus, progress: Progress) -> tuple[Student, dict[str, Any] | None]:
    """The student, and in the first process what is measured of the pruned model, which is whole there for that."""
    if ranks.world() == 1:
        model = checkpoint.load(job.pruned, device=str(job.device))
        before = _measure(model, corpus, progress)
        return Student(model, job.settings), before

    def measure() -> dict[str, Any]:
        return _measure(checkpoint.load(job.pruned, device=str(job.device)), corpus, progress)

    before = ranks.from_first(measure)
    # Mapped: every process takes its share of one layer after the other.
    return Student(checkpoint.load(job.pruned), job.settings, job.device), before


def _train(
    student: Student, corpus: Corpus, job: _Job, placement: Placement, progress: Progress
) -> tuple[dict[str, Any] | None, list[float], float]:
    """What is measured of the dense model, the loss of every step, and the seconds that they took."""
    training = Training(student, corpus, job.settings, job.unfinished)
    teacher = None if job.teacher is None else load_teacher(job.teacher, job.device, placement)
    with timed("scoring"):
        dense = None if teacher is None else measured_by(teacher.log_perplexity(corpus.held_out, progress), teacher)
    ranks.from_first(lambda: _make_room(job, student))
    started = time.perf_counter()
    losses = training.run(teacher, progress)
    return dense, losses, time.perf_counter() - started


def _end(student: Student, job: _Job) -> PreTrainedModel:
    """The recovered model; of shares, made anew from the pruned one and the state on disk."""
    if ranks.world() > 1:
        student.release()
        gc.collect()  # FSDP's modules and their hooks know each other
        student = Student(checkpoint.load(job.pruned, device=str(job.device)), job.settings)
        student.take(job.unfinished.weights())
    return student.merged()


def _make_room(job: _Job, student: Student) -> None:
    trained = sum(parameter.numel() for parameter in student.trained.values())
    # The state (weight and two moments in fp32) exists twice while it is replaced.
    require_space(job.output, model_bytes(student.model) + 2 * 12 * trained)
    job.unfinished.begin()


@timed("scoring")
def _measure(model: PreTrainedModel, corpus: Corpus, progress: Progress) -> dict[str, Any]:
    """Perplexity on the part of the text that is not trained on."""
    scored = in_compute_dtype(model)
    return measured_by(model_log_perplexity(scored, corpus.held_out, progress), scored)


def measured_by(value: float, model: PreTrainedModel | Teacher) -> dict[str, Any]:
    return {
        "log_perplexity": value,
        "perplexity": math.exp(value),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }


def _report(
    job: _Job, corpus: Corpus, measured: tuple[dict, dict, dict | None], losses: list[float], seconds: float
) -> dict[str, Any]:
    """The pruned checkpoint's report, extended: "measured" and "dense" are now those of the held-out part."""
    before, after, dense = measured
    protocol = Protocol.of_reading(job.reading, corpus.held_out, "last 5 %, not trained on").to_dict()
    settings = job.settings
    recovery = {
        "from": str(job.pruned.resolve()),
        "question": job.unfinished.question,
        "settings": settings.to_dict(),
        "teacher": None if job.teacher is None else str(job.teacher.resolve()),
        "text": {"path": protocol["text"], "sha256": protocol["sha256"], "training_tokens": corpus.training.numel()},
        "processes": ranks.world(),
        "steps": settings.steps,
        "tokens": settings.steps * settings.batch * settings.sequence_length,
        "before": before,
        "loss": ends(losses),
        "seconds": seconds,
        "pruned": {name: job.report.get(name) for name in _OF_THE_PRUNED},
        "earlier": job.report.get("recovery"),
        "versions": versions(),
    }
    kept = {name: value for name, value in job.report.items() if name not in (*_OF_THE_PRUNED, "files")}
    return kept | {"measured": after | {"protocol": protocol}, "predicted": None, "dense": dense, "recovery": recovery}


def ends(losses: list[float]) -> dict[str, float]:
    """Mean loss of the first and of the last twentieth of the steps, in nats a token."""
    count = max(1, len(losses) // 20)
    return {"first": sum(losses[:count]) / count, "last": sum(losses[-count:]) / count}
