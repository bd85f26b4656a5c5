"""``ppf fit``: from a checkpoint and a text to a complete run. Everything it does can be interrupted and resumed."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from .._version import versions
from ..choose.agent import error_energies
from ..errors import InputError
from ..families import KINDS, family_of
from ..fast.permute import permute_layer
from ..files import require_space, write_json, write_safetensors
from ..model.decoder import Decoder
from ..model.geometry import structure_of
from ..model.layer import LayerRanking
from ..model.precision import compute_dtype
from ..model.structure import Structure
from ..progress import Progress, silent
from ..text import Splits, check_context, split, take_tokens
from .calibration import LayerStatistics, calibrate
from .collection import Learning, collect, learn
from .library import library_bytes, refit_layer, save_refits
from .ranking import rank_layer
from .ranking.gradient import GRADIENT_RANKINGS, Scores, gradient_scores
from .reader import Reader
from .rounds import Journal
from .run import Run, Settings
from .run.directory import MANIFEST, ROUNDS, layer_file, read_manifest
from .run.settings import portable_settings
from .search.exploration import check_evaluations
from .session import Session

# The agent that stays is trained longer than those that only propose the next round.
_FINAL_EFFORT = 2.0
_FINAL_EXPERTS = 2
_TEXTS = "texts.safetensors"
# Texts, statistics, experience, predictor and agent beside the library: generously.
_OTHER_FILES = 64 << 20


def fit(
    model: str | Path,
    text: str | Path,
    output: str | Path,
    *,
    settings: Settings | None = None,
    eval_text: str | Path | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> Run:
    """Learn how much every layer of ``model`` can lose; leaves a run in ``output`` and returns it.

    Calibration uses the first three quarters of ``text`` and evaluation the rest, or ``eval_text`` if given. If
    ``output`` holds an unfinished fit of the same model, texts and settings, it goes on where that stopped; a finished
    one is returned as it is. Raises ``InputError`` for anything wrong with the arguments, before any work.
    """
    settings, output = settings or Settings(), Path(output)
    target = checkpoint.resolve_device(device)
    config = checkpoint.check_checkpoint(model)
    structure = structure_of(family_of(config.model_type), config)
    check_context(settings.sequence_length, config.max_position_embeddings)
    settings = portable_settings(settings, structure) if settings.portable else settings
    check_evaluations(settings.evaluations, settings.grid(structure))
    decoder = _prepare(model, text, eval_text, output, settings, structure, target)
    session = Session(Run(output), target, decoder)
    if not session.run.is_complete:
        started = time.perf_counter()
        _calibrate(session, progress)
        _learn(session, progress)
        _finish(session, time.perf_counter() - started)
    return Run(output)


def _prepare(
    model: str | Path,
    text: str | Path,
    eval_text: str | Path | None,
    output: Path,
    settings: Settings,
    structure: Structure,
    device: torch.device,
) -> Decoder | None:
    """Make ``output`` a run with its texts and its manifest, or check that it is one of the same question.

    A new run's model is read, and returned, before anything is written: NaN and Inf weights show only then.
    """
    question = {
        "fingerprint": checkpoint.fingerprint(model),
        "structure": structure.to_dict(),
        "settings": settings.to_dict(),
        "texts": {"text": _sha256(text), "eval_text": _sha256(eval_text) if eval_text else None},
    }
    if output.exists() and (not output.is_dir() or not all(_unfinished_start(file) for file in output.iterdir())):
        _require_same(output, question)
        return None
    parts = _splits(model, text, eval_text, settings)
    decoder = checkpoint.load_decoder(model, device=str(device))
    require_space(output, library_bytes(settings.grid(structure)) + _OTHER_FILES)
    output.mkdir(parents=True, exist_ok=True)
    tensors = {"calibration": parts.calibration.int(), "evaluation": parts.evaluation.int()}
    write_safetensors(output / _TEXTS, tensors)
    names = {"text": str(Path(text).resolve()), "eval_text": str(Path(eval_text).resolve()) if eval_text else None}
    manifest = {"model": str(Path(model).resolve()), "files": names, "versions": versions(), "state": "fitting"}
    write_json(output / MANIFEST, question | manifest)
    return decoder


def _unfinished_start(file: Path) -> bool:
    """True for what a fit leaves that was killed before it had written its manifest."""
    return file.name == _TEXTS or (
        file.name.endswith(".tmp") and file.name.startswith((f".{_TEXTS}.", f".{MANIFEST}."))
    )


def _require_same(output: Path, question: dict[str, Any]) -> None:
    if not (output / MANIFEST).exists():
        raise InputError("output", output, "exists, is not empty and is not a run", "Name a new folder")
    manifest = read_manifest(output)
    remedy = "Use the same arguments to resume it, or name a new folder"
    if manifest["fingerprint"] != question["fingerprint"]:
        raise InputError("output", output, "is a run of another model", remedy)
    theirs, ours = Settings.from_dict(manifest["settings"]), Settings.from_dict(question["settings"])
    if name := ours.difference(theirs):
        problem = f"is a run with {name.replace('_', '-')} = {getattr(theirs, name)}, not {getattr(ours, name)}"
        raise InputError("output", output, problem, remedy)
    if manifest["texts"] != question["texts"]:
        raise InputError("output", output, "is a run on another text", remedy)


def _splits(model: str | Path, text: str | Path, eval_text: str | Path | None, settings: Settings) -> Splits:
    reader = Reader.of(model, settings.sequence_length)
    sequences = reader.sequences(text)
    if eval_text is None:
        return split(sequences, settings.calibration_tokens, settings.evaluation_tokens)
    evaluation = reader.sequences(eval_text, "eval-text")
    return Splits(
        take_tokens(sequences, settings.calibration_tokens), take_tokens(evaluation, settings.evaluation_tokens)
    )


def _calibrate(session: Session, progress: Progress) -> None:
    """Write every layer's statistics, ranking and library; nothing to do if the last layer's are there."""
    run, layers = session.run, session.run.structure.layers
    for folder in ("statistics", "library"):
        (run.path / folder).mkdir(exist_ok=True)
    if (run.path / layer_file("library", layers - 1)).exists():
        return
    computing = session.decoder.to(compute_dtype(session.decoder.dtype, session.device))
    sequences, name, scores = run.sequences("calibration"), run.settings.ranking, [None] * layers
    if name in GRADIENT_RANKINGS:
        scores = gradient_scores(name, computing, sequences, run.settings.seed)
    stream = calibrate(computing, sequences)
    progress("calibrate", 0, layers)
    for index in range(layers):
        # Passed on and forgotten: a name here would keep one layer's Grams while the next one's are computed.
        _store_layer(session, index, next(stream), scores[index])
        progress("calibrate", index + 1, layers)


def _store_layer(session: Session, index: int, statistics: LayerStatistics, scores: Scores | None) -> None:
    """Write one layer's statistics, ranking and library; the library comes last and marks the layer as done."""
    run, decoder = session.run, session.decoder
    ranking = rank_layer(run.settings.ranking, decoder, index, statistics, scores)
    write_safetensors(run.path / layer_file("statistics", index), _layer_tensors(statistics, ranking))
    ranked = permute_layer(decoder.names(index), decoder.layers[index], ranking)
    outputs = decoder.names(index).outputs(ranked)
    save_refits(run.path / layer_file("library", index), refit_layer(outputs, statistics, ranking, run.grid, index))


def _layer_tensors(statistics: LayerStatistics, ranking: LayerRanking) -> dict[str, Tensor]:
    tensors = {f"ranking.{kind}": ranking.of(kind) for kind in KINDS}
    for kind in KINDS:
        # The Gram itself is not stored: the library's L⁻¹ holds it, since H + λI = L Lᵀ.
        if (part := statistics.of(kind)) is not None:
            tensors |= {f"{kind}.mean": part.mean, f"{kind}.variance": part.variance}
    return tensors


def _learn(session: Session, progress: Progress) -> None:
    """Collect the experience, then train the predictor and the agent that stay."""
    run, settings = session.run, session.run.settings
    evaluator = session.evaluator()
    energies = error_energies([evaluator.library.error(s) for s in range(run.grid.sublayers)], run.grid)
    how = Learning(settings.predictor, settings.agent, energies)
    journal = Journal(run.path / ROUNDS)
    collect(evaluator, run.experience, settings.evaluations, settings.seed, progress, how, journal, settings.early_stop)
    progress("learn", 0, 1)
    rows = run.experience.rows()
    fitted = learn(
        run.grid, rows, settings.seed, session.device, effort=_FINAL_EFFORT, learning=how, experts=_FINAL_EXPERTS
    )
    write_safetensors(run.path / "predictor.safetensors", fitted.predictor.state_dict())
    write_safetensors(run.path / "agent.safetensors", fitted.agent.state_dict())
    progress("learn", 1, 1)


def _finish(session: Session, seconds: float) -> None:
    run = session.run
    run.experience.close()  # folds the write-ahead log into the file: a finished run can be copied
    device = torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "cpu"
    write_json(run.path / MANIFEST, run.manifest | {"state": "complete", "device": device, "seconds": seconds})


def _sha256(path: str | Path) -> str:
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise InputError("text", path, f"cannot be read ({error.strerror})", "Give a UTF-8 text file") from None
