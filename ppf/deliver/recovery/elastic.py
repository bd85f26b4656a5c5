"""One recovery for all sizes: a run's dense weights are trained at many policies of its agent, and become a new run."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ... import checkpoint, memory, ranks
from ..._version import versions
from ...checkpoint.report import standing_report
from ...checkpoint.writing import model_bytes
from ...errors import InputError, shown
from ...families import family_of
from ...fitting.library import library_bytes
from ...fitting.reader import Reader, Reading
from ...fitting.retrained import write_retrained
from ...fitting.run import Protocol, Run
from ...fitting.run.directory import AGENT, FIRST, PREDICTOR
from ...fitting.run.manifest import MANIFEST, is_run
from ...fitting.session import Session
from ...model.policy import Policy
from ...model.stream import Placement
from ...progress import Progress, logged, silent
from ...storage.files import check_output, require_space
from ...storage.locks import for_all, locked_result, tidy, waiting
from ...timings import timed
from ..elastic.model import elastic_class
from ..results import source_report
from .corpus import Corpus
from .recover import deciding, ends, measured_by
from .settings import ElasticSettings
from .shared import SharedWeights
from .state import Unfinished
from .teacher import find_teacher
from .teaching import load_teacher
from .training import Training

# Ratios at which before and after are measured on the held-out text.
_MEASURED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def recover_elastic(
    run: str | Path,
    text: Any,
    output: str | Path,
    *,
    settings: ElasticSettings | None = None,
    teacher: str | Path | None = None,
    device: str = "auto",
    placement: Placement | None = None,
    force: bool = False,
    progress: Progress = silent,
    wait: bool = False,
) -> dict[str, Any]:
    """Train the dense weights of ``run``, a finished fit, so that its policies of all sizes are good models, and
    write ``output``: the same run with the trained weights in it, which everything that takes a run takes.

    Each step trains the least and the most pruned policy of ``settings`` and some between, with the library's refits,
    under one teacher: the dense model, or ``teacher``. ``placement`` says where the teacher's weights are kept.
    Rankings, library and agent are carried over; some policies are measured anew, and the predictor learns from these.
    Resumes, and runs under torchrun, as :func:`ppf.recover` does; every process holds all weights that are trained.

    Returns what the new ``run.json`` says under "elastic". Raises ``InputError`` for anything wrong with the arguments,
    before any work, for a run whose dense model is gone or has changed, and for families that hold several projections
    in one matrix; ``PPFError`` if the training diverges.
    """
    settings, placement = settings or ElasticSettings(), placement or Placement()
    with waiting(wait), for_all(lambda: locked_result(output)):
        job = ranks.from_first(lambda: _check(run, text, Path(output), settings, teacher, device, force))
        return job if isinstance(job, dict) else _recover(job, placement, force, progress)


@dataclass(frozen=True)
class _Job:
    run: Path
    reading: Reading
    output: Path
    settings: ElasticSettings
    teacher: Path | None
    device: torch.device
    unfinished: Unfinished


def _check(
    run: str | Path, text: Any, output: Path, settings: ElasticSettings, teacher: str | Path | None, device: str,
    force: bool,
) -> _Job | dict[str, Any]:  # fmt: skip
    """Everything that can be refused without reading weights; what an output says that is this result already."""
    target, run = checkpoint.resolve_device(device), _opened(run)
    if settings.largest > run.grid.maximum_ratio:
        remedy = f"Use at most {run.grid.maximum_ratio:.2f}"
        raise InputError("largest-ratio", settings.largest, "is more than this model can lose", remedy)
    reader = Reader.of(run.model_path, settings.sequence_length)
    folder = find_teacher(run.model_path, _lineage(run), teacher, settings.distillation)
    question = {
        "run": run.files.owner,
        "policies": {name: run.files.seal(name) for name in (FIRST, PREDICTOR, AGENT) if run.files.exists(name)},
        "text": None,
        "teacher": None if folder is None else checkpoint.fingerprint(folder),
        "settings": deciding(settings),
        "device": target.type,
    }
    there = None if force else _recovered(output)
    _check_destination(output, force, {"run": run.path, "dense model": run.model_path, "teacher": folder}, there)
    reading = reader.read(text, most=Corpus.needed(settings.steps * settings.batch))
    question["text"] = reading.sha256 if reading.read_as is None else reading.read_as | {"sha256": reading.sha256}
    question = json.loads(json.dumps(question))  # as it comes back from disk
    if there is not None:
        if there["question"] != question or there["versions"] != versions():
            check_output(output)  # which refuses it
        Unfinished.remove_of(output, question)
        tidy(output)
        warnings.warn(f"ppf: {shown(output)} holds exactly this already: nothing was written", stacklevel=2)
        return there
    if (other := _recovered(output)) is not None and other["question"] != question:
        Unfinished.remove_of(output, other["question"])
    return _Job(run.path, reading, output, settings, folder, target, Unfinished(output, question))


def _opened(path: str | Path) -> Run:
    """The run, if it is one that can be trained."""
    if not is_run(Path(path)) and (Path(path) / "config.json").is_file():
        remedy = "Give the run it was pruned from, or drop --elastic to recover this one size"
        raise InputError("run", path, "is a checkpoint of one size, not a run", remedy)
    run = Run(path)
    run.require_complete()
    run.require_model()
    elastic_class(family_of(checkpoint.read_config(run.model_path).model_type))
    return run


def _lineage(run: Run) -> dict[str, Any]:
    """The report that tells the teacher: a fit's dense model, or the one at the beginning of elastic recoveries."""
    if run.manifest.get("elastic"):
        return standing_report(run.model_path)
    manifest = run.manifest
    model = {"path": str(run.model_path), "fingerprint": manifest["fingerprint"], "source": manifest.get("source")}
    return {"model": model}


def _recovered(output: Path) -> dict[str, Any] | None:
    """What ``output`` says of its elastic recovery, if it is a finished one."""
    if not (output / MANIFEST).is_file():
        return None
    try:
        found = Run(output)
        found.require_complete()
        found.require_model()
    except InputError:
        return None
    told = found.manifest.get("elastic")
    return told if isinstance(told, dict) and isinstance(told.get("question"), dict) else None


def _check_destination(output: Path, force: bool, inputs: dict[str, Path | None], there: dict[str, Any] | None) -> None:
    target = output.resolve()
    for name, folder in inputs.items():
        if folder is not None and (target == folder.resolve() or target in folder.resolve().parents):
            raise InputError("output", output, f"holds the {name}", "Name a new folder")
    if there is None:
        check_output(output, force)


def _recover(job: _Job, placement: Placement, force: bool, progress: Progress) -> dict[str, Any]:
    job = replace(job, device=ranks.device(job.device))
    memory.bound(job.device, placement.gpu_memory)
    progress = logged(progress if ranks.first() else silent)
    corpus = Corpus.of(job.reading.sequences.long())
    before = ranks.from_first(lambda: _before(job, corpus))
    with ranks.together():
        shared, dense, losses, seconds = _train(job, corpus, placement, progress)

    def end() -> dict[str, Any]:
        nonlocal shared
        model, shared = shared.merged(), None
        facts = _facts(job, corpus, dense, losses, seconds)
        _write(job, model, corpus, facts, before, force, progress)
        job.unfinished.remove()
        return Run(job.output).manifest["elastic"]

    return ranks.from_first(end)


def _train(
    job: _Job, corpus: Corpus, placement: Placement, progress: Progress
) -> tuple[SharedWeights, dict[str, Any] | None, list[float], float]:
    """The trained weights, what is measured of the teacher, the loss of every step, and the seconds they took."""
    with timed("reading weights"):
        shared = SharedWeights(Session(Run(job.run), job.device, placement=Placement("gpu")), job.settings)
    training = Training(shared, corpus, job.settings, job.unfinished)
    teacher = None if job.teacher is None else load_teacher(job.teacher, job.device, placement)
    with timed("scoring"):
        dense = None if teacher is None else measured_by(teacher.log_perplexity(corpus.held_out, progress), teacher)
    ranks.from_first(lambda: _make_room(job, shared))
    started = time.perf_counter()
    losses = training.run(teacher, progress)
    return shared, dense, losses, time.perf_counter() - started


def _make_room(job: _Job, shared: SharedWeights) -> None:
    trained = sum(parameter.numel() for parameter in shared.trained.values())
    # The state (weight and two moments in fp32) exists twice while it is replaced.
    library = library_bytes(Run(job.run).grid)
    require_space(job.output, model_bytes(shared.model) + library + 2 * 12 * trained)
    job.unfinished.begin()


@timed("scoring")
def _before(job: _Job, corpus: Corpus) -> dict[float, tuple[Policy, float]]:
    """Some of the run's policies by their ratios, with their perplexities on the part of the text that is not trained
    on."""
    run = Run(job.run)
    ratios = [ratio for ratio in _MEASURED if ratio <= run.grid.maximum_ratio]
    policies = run.policies(ratios)
    values = _perplexities(Session(run, job.device, placement=Placement("gpu")), policies, corpus)
    return dict(zip(ratios, zip(policies, values, strict=True), strict=True))


def _perplexities(session: Session, policies: Sequence[Policy], corpus: Corpus) -> list[float]:
    return [math.exp(value) for value in session.evaluator(sequences=corpus.held_out).log_perplexities(policies)]


def _write(
    job: _Job, model: PreTrainedModel, corpus: Corpus, facts: dict[str, Any],
    before: dict[float, tuple[Policy, float]], force: bool, progress: Progress,
) -> None:  # fmt: skip
    """The new run."""
    run = Run(job.run)
    source, tokenizer = checkpoint.Checkpoint(run.model_path), checkpoint.load_tokenizer(run.model_path)
    if (generation := checkpoint.load_generation_config(run.model_path)) is not None:
        model.generation_config = generation
    lineage = _lineage(run) | {"source": source_report(run.model_path)}
    if run.manifest.get("elastic"):
        lineage = {name: lineage[name] for name in ("model", "source")}

    def write_model(folder: Path) -> None:
        checkpoint.save(model, tokenizer, folder, lineage | {"elastic": facts}, source=source)

    def about(session: Session) -> dict[str, Any]:
        after = _perplexities(session, [policy for policy, _ in before.values()], corpus)
        rows = zip(before.items(), after, strict=True)
        return facts | {"held_out": [{"ratio": r, "before": old, "after": new} for (r, (_, old)), new in rows]}

    write_retrained(
        run, job.output, write_model, about, device=job.device, placement=Placement("gpu"), force=force,
        progress=progress,
    )  # fmt: skip


def _facts(
    job: _Job, corpus: Corpus, dense: dict[str, Any] | None, losses: list[float], seconds: float
) -> dict[str, Any]:
    """What the new run says of its training."""
    settings = job.settings
    protocol = Protocol.of_reading(job.reading, corpus.held_out, "last 5 %, not trained on").to_dict()
    return {
        "from": str(job.run.resolve()),
        "question": job.unfinished.question,
        "settings": settings.to_dict(),
        "teacher": None if job.teacher is None else str(job.teacher.resolve()),
        "text": {"path": protocol["text"], "sha256": protocol["sha256"], "training_tokens": corpus.training.numel()},
        "processes": ranks.world(),
        "steps": settings.steps,
        "tokens": settings.steps * settings.batch * settings.sequence_length,
        "dense": dense,
        "protocol": protocol,
        "loss": ends(losses),
        "seconds": seconds,
        "versions": versions(),
    }
