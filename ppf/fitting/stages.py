"""``ppf fit``: from a checkpoint and a text to a complete run. Everything it does can be interrupted and resumed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import checkpoint, ranks
from .._version import versions
from ..checkpoint.hashes import hash_folder
from ..choose.additive import Additive
from ..errors import InputError
from ..families import KINDS, family_of
from ..fast.permute import permute_layer
from ..model.decoder import Decoder
from ..model.geometry import structure_of
from ..model.layer import LayerRanking
from ..model.precision import compute_dtype
from ..model.stream import Placement
from ..model.structure import Structure
from ..progress import Progress, silent
from ..storage.files import require_space
from ..storage.leftovers import is_temporary_of
from ..storage.locks import for_all, is_lock, sweep, waiting
from ..text import Splits, check_context
from ..timings import seconds, since, timed
from .alone import alone_in, may_write
from .calibration import LayerStatistics, calibrate
from .collection import collect, schedule, try_agent
from .evaluation.shared import led
from .experience import Experience
from .factors import factorise_layer, tensors_of
from .first import energies_of, first_answer
from .in_memory import placed
from .learning import Learning, learn
from .library import library_bytes
from .own_answers import Answers, OwnAnswers
from .ranking import AUTO, rank_layer
from .ranking.auto import Chosen, choose_rankings
from .ranking.gradient import GRADIENT_RANKINGS, Scores, gradient_scores
from .rounds import ROUNDS, Journal
from .run import Run, Settings
from .run.directory import AGENT, FIRST, MODEL, PREDICTOR, TEXTS, layer_file
from .run.manifest import EXPERIENCE, MANIFEST, in_memory, read_manifest, sealed, write_manifest
from .run.settings import portable_settings, settings_of
from .search.exploration import check_evaluations
from .session import Session
from .texts import Texts

# The agent that stays is trained longer than those that only propose the next round, and away from what the predictor
# does not know, which is what those are there to find out.
_FINAL_EFFORT = 2.0
_FINAL_EXPERTS = 2
_FINAL_CAUTION = 2.0
# Texts, statistics, experience, predictor and agent beside the library: generously.
_OTHER_FILES = 64 << 20


def fit(
    model: str | Path | PreTrainedModel,
    text: Any,
    output: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: Settings | None = None,
    eval_text: Any = None,
    own_answers: Any = None,
    answer_tokens: int | None = None,
    answer_temperature: float | None = None,
    device: str = "auto",
    placement: Placement | None = None,
    progress: Progress = silent,
    wait: bool = False,
    **values: Any,
) -> Run:
    """Learn how much every layer of ``model`` can lose; leaves a run in ``output`` and returns it.

    ``model`` is a folder, ``org/name`` or ``org/name@revision`` on the hub, a GGUF file, or a transformers model in
    memory with its ``tokenizer``, which becomes RUN/model.

    Texts are paths, datasets, iterables of strings or token ids, or a :class:`ppf.Text` of one of these. Calibration
    uses the first three quarters of ``text`` and evaluation the rest, or ``eval_text`` if given; of a dataset no more
    is read than both need. ``own_answers`` are prompts, texts or chats: the model answers them first, with at most
    ``answer_tokens`` tokens each (128) drawn at ``answer_temperature`` (1), and these answers calibrate in the place of
    ``text``, which may then be None or a text to evaluate on; :mod:`ppf.fitting.own_answers` says more. If
    ``output`` holds an unfinished fit of the same model, texts and settings, it goes on where that stopped; a finished
    one is returned as it is. ``placement`` says where the weights are kept, by default on the device if they fit.
    Raises ``InputError`` for anything wrong with the arguments, before any work, and while another process writes into
    ``output``, unless that is to ``wait``.

    Settings come as ``settings`` or one by one, under the names of :class:`Settings`: ``evaluations=600``.
    ``progress(stage, done, total)`` is called as the work goes on, and the logger "ppf" is told of every stage.

    Processes that :func:`ppf.ranks.start` has brought together all call this with the same arguments, share the work,
    and get the same run; ``output`` must be a folder that all of them see.
    """
    before, settings, output = seconds(), settings_of(settings, values), Path(output)
    asked = OwnAnswers.asked(own_answers, answer_tokens, answer_temperature)
    if isinstance(model, PreTrainedModel):
        alone = for_all(lambda: alone_in(output, copying=True))
        with waiting(wait), alone, placed(model, tokenizer, output) as folder:
            return fit(
                folder, text, output, settings=settings, eval_text=eval_text, own_answers=own_answers,
                answer_tokens=answer_tokens, answer_temperature=answer_temperature, device=device, placement=placement,
                progress=progress,
            )  # fmt: skip
    target = checkpoint.resolve_device(device)
    config = checkpoint.check_checkpoint(model)
    structure = structure_of(family_of(config.model_type), config)
    check_context(settings.sequence_length, config.max_position_embeddings)
    settings = portable_settings(settings, structure) if settings.portable else settings
    check_evaluations(settings.evaluations, settings.grid(structure))
    answers = asked and Answers(model, asked, settings, target, placement, progress)
    texts = Texts(model, text, eval_text, settings, answers)
    with waiting(wait), for_all(lambda: alone_in(output)):
        decoder = _prepare(model, texts, output, settings, structure, target, placement)
        session = Session(Run(output), target, decoder, placement)
        del decoder  # the session alone has it: what wants it in ranking order takes it over
        if not session.run.is_complete:
            started = time.perf_counter()
            _calibrate(session, progress)
            first = first_answer(session)
            led(session, lambda: _conclude(session, first, started, before, progress))
    return Run(output)


def _prepare(
    model: str | Path,
    texts: Texts,
    output: Path,
    settings: Settings,
    structure: Structure,
    device: torch.device,
    placement: Placement | None,
) -> Decoder | None:
    """Make ``output`` a run with its texts and its manifest, or check that it is one of the same question.

    A new run's model is read, and returned, before anything is written: NaN and Inf weights show only then.
    """
    question, parts = ranks.from_first(lambda: _question(model, texts, output, settings, structure))
    if parts is None:
        return None
    with timed("reading weights"):
        decoder = checkpoint.load_decoder(model, device=str(device), placement=placement)
    _require_weights(decoder, settings)
    parts, facts = parts
    about = {"vocabulary": decoder.config.vocab_size, "versions": versions(), "state": "fitting"}
    manifest = _place(output, model) | facts | about
    ranks.from_first(lambda: _begin(output, parts, question | manifest, library_bytes(settings.grid(structure))))
    return decoder


def _require_weights(decoder: Decoder, settings: Settings) -> None:
    """Raise ``InputError`` if the ranking needs all weights at once and they stream."""
    if settings.ranking in GRADIENT_RANKINGS:
        decoder.require_resident(f"--ranking {settings.ranking}")


def _question(
    model: str | Path,
    texts: Texts,
    output: Path,
    settings: Settings,
    structure: Structure,
) -> tuple[dict[str, Any], tuple[Splits, dict[str, Any]] | None]:
    """What is asked, and unless ``output`` holds a run that asks the same, the texts and what is said of them."""
    question = {
        "fingerprint": checkpoint.fingerprint(model),
        "structure": structure.to_dict(),
        "settings": settings.to_dict(),
        "texts": texts.identity(),
    }
    if output.exists() and (not output.is_dir() or not all(_unfinished_start(f, model) for f in output.iterdir())):
        _require_same(output, question)
        sweep(output)
        _remember(output, model)
        return question, None
    sweep(output)
    return question, (texts.splits(), texts.facts)


def _place(output: Path, model: str | Path) -> dict[str, Any]:
    """Where the dense model is, and where it came from."""
    found = checkpoint.locate(model)
    source = {"kind": "memory"} if found.folder == output / MODEL else found.source
    return {"model": str(found.folder.resolve()), "source": source}


def _remember(output: Path, model: str | Path) -> None:
    """Take down where the dense model is now, if it is no longer where the run says. It is the same one."""
    manifest = read_manifest(output)
    if not in_memory(manifest) and not Path(manifest["model"]).is_dir() and may_write(output):
        write_manifest(output, manifest | _place(output, model))


def _begin(output: Path, parts: Splits, manifest: dict[str, Any], library: int) -> None:
    """Make ``output`` a run without results; ``library`` are the bytes that its largest part will have."""
    require_space(output, library + _OTHER_FILES)
    output.mkdir(parents=True, exist_ok=True)
    files = sealed(output, manifest)
    files.write_safetensors(TEXTS, parts.tensors())
    Experience(output / EXPERIENCE, files.owner).close()
    write_manifest(output, manifest | {"model_files": hash_folder(output / MODEL) if in_memory(manifest) else {}})


def _unfinished_start(file: Path, model: str | Path) -> bool:
    """True for what a fit of ``model`` leaves that was killed before it had written its manifest."""
    left = is_lock(file.name, MODEL) or is_temporary_of(file.name, TEXTS, EXPERIENCE, MANIFEST, MODEL)
    return file.name in (TEXTS, EXPERIENCE) or left or (file.name == MODEL and file == Path(model))


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
    if manifest["texts"].get("own_answers") != question["texts"].get("own_answers"):
        problem = "is a run with other own answers: prompts, --answer-tokens or --answer-temperature"
        raise InputError("output", output, problem, remedy)
    if manifest["texts"] != question["texts"]:
        raise InputError("output", output, "is a run on another text", remedy)


def _calibrate(session: Session, progress: Progress) -> None:
    """Write every layer's statistics, ranking and library; nothing to do if all are there.

    All of n processes have all statistics. Process r stores layers r, r + n, …, so that they factorise side by side.
    """
    run, layers, processes = session.run, session.run.structure.layers, ranks.world()
    if ranks.from_first(lambda: all(run.files.exists(layer_file("library", index)) for index in range(layers))):
        return
    for folder in ("statistics", "library"):
        (run.path / folder).mkdir(exist_ok=True)
    computing = session.decoder.to(compute_dtype(session.decoder.dtype, session.device))
    sequences, scored = run.sequences("calibration"), run.scored("calibration")
    chosen = _chosen(session, computing, progress)
    scores = _scores(session, computing, sequences, scored)
    stream = calibrate(computing, sequences, scored) if chosen.statistics is None else iter(chosen.statistics)
    mine: list[LayerStatistics] = []
    progress("calibrate", 0, layers)
    for index in range(layers):
        own = index - index % processes + ranks.rank()
        # Never a name for what is next: it would keep one layer's Grams while the next one's are computed.
        if index == own:
            mine.append(next(stream))
        else:
            next(stream)
        if (index + 1) % processes == 0 or index + 1 == layers:
            if mine:
                _store_layer(session, own, mine.pop(), scores[own], chosen.rankings[own])
            progress("calibrate", index + 1, layers)
    ranks.barrier()


def _chosen(session: Session, decoder: Decoder, progress: Progress) -> Chosen:
    """Every layer's ranking where each chooses its own, after run.json has been told which; None each for others."""
    run = session.run
    if run.settings.ranking != AUTO:
        return Chosen([None] * run.structure.layers, {})
    texts = ((run.sequences(part), run.scored(part)) for part in ("calibration", "evaluation"))
    found = choose_rankings(decoder, run.grid, *texts, progress)
    run.manifest["rankings"] = found.names
    ranks.from_first(lambda: write_manifest(run.path, run.manifest))
    return found


def _scores(session: Session, decoder: Decoder, sequences: Tensor, scored: Tensor | None) -> list[Scores | None]:
    """Every layer's scores for a ranking by gradients, the first process's in all; None each for other rankings."""
    settings = session.run.settings
    if settings.ranking not in GRADIENT_RANKINGS:
        return [None] * session.run.structure.layers
    _require_weights(decoder, settings)

    def found() -> list[dict[str, Tensor]]:
        layers = gradient_scores(settings.ranking, decoder, sequences, settings.seed, scored)
        return [{kind: score.cpu() for kind, score in layer.items()} for layer in layers]

    return [{kind: score.to(session.device) for kind, score in layer.items()} for layer in ranks.from_first(found)]


def _store_layer(
    session: Session, index: int, statistics: LayerStatistics, scores: Scores | None, chosen: LayerRanking | None
) -> None:
    """Write one layer's statistics, ranking and library; the library comes last and marks the layer as done."""
    run, decoder = session.run, session.decoder
    ranking = chosen or rank_layer(run.settings.ranking, decoder, index, statistics, scores)
    run.files.write_safetensors(layer_file("statistics", index), _layer_tensors(statistics, ranking))
    ranked = permute_layer(decoder.names(index), decoder.layers[index], ranking)
    factors = factorise_layer(decoder.names(index).outputs(ranked), statistics, ranking, run.grid, index)
    run.files.write_safetensors(layer_file("library", index), tensors_of(factors))


def _layer_tensors(statistics: LayerStatistics, ranking: LayerRanking) -> dict[str, Tensor]:
    tensors = {f"ranking.{kind}": ranking.of(kind) for kind in KINDS}
    for kind in KINDS:
        # The Gram itself is not stored: the library's factors are all that is needed of it.
        if (part := statistics.of(kind)) is not None:
            tensors |= {f"{kind}.mean": part.mean, f"{kind}.variance": part.variance}
    return tensors


def _conclude(
    session: Session, first: Additive, started: float, before: dict[str, float], progress: Progress
) -> None:  # fmt: skip
    """All that follows calibration; in the first process, while others evaluate for it."""
    if session.run.settings.evaluations:
        _learn(session, first, progress)
    finish(session, time.perf_counter() - started, before)


def _learn(session: Session, first: Additive, progress: Progress) -> None:
    """Collect the experience, train the predictor and the agent that stay, and try these."""
    run, settings = session.run, session.run.settings
    evaluator = session.evaluator()
    how = Learning(settings.predictor, settings.agent, energies_of(session, run.grid), first)
    journal = Journal(run.files)
    collect(evaluator, run.experience, settings.evaluations, settings.seed, progress, how, journal, settings.early_stop)
    progress("learn", 0, 1)
    rows = run.experience.rows(before_round=len(schedule(settings.evaluations)))
    fitted = learn(
        run.grid, rows, settings.seed, session.device, effort=_FINAL_EFFORT, learning=how, experts=_FINAL_EXPERTS,
        caution=_FINAL_CAUTION,
    )  # fmt: skip
    progress("learn", 1, 1)
    try_agent(evaluator, run.experience, settings.evaluations, fitted, settings.seed, progress, journal)
    run.files.write_safetensors(PREDICTOR, fitted.predictor.state_dict())
    run.files.write_safetensors(AGENT, fitted.agent.state_dict())


@timed("finishing")
def finish(session: Session, took: float, before: dict[str, float]) -> None:
    """Mark the run as complete, with the checksums of all that it consists of; it says where the time of this process
    went since ``before``."""
    run = session.run
    rows, last = run.experience.state
    run.experience.close()  # folds the write-ahead log into the file: a finished run can be copied
    device = torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "cpu"
    told = {"state": "complete", "device": device, "seconds": took, "timings": since(before)}
    sums = {"seals": _seals(run), "experience": {"rows": rows, "checksum": last}}
    write_manifest(run.path, run.manifest | told | sums)


def _seals(run: Run) -> dict[str, str]:
    """The checksums of all files of a finished fit, as they stand in them."""
    layers = range(run.structure.layers)
    names = [layer_file(folder, index) for folder in ("statistics", "library") for index in layers]
    names += [TEXTS, *(name for name in (FIRST, PREDICTOR, AGENT, ROUNDS) if run.files.exists(name))]
    return {name: run.files.seal(name) for name in names}
