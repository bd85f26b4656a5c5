"""``ppf.evaluate``: a model's perplexity on a text, as it is or with some of its units only, and what tasks say."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import checkpoint, ranks
from ..checkpoint.checks import read_config
from ..errors import InputError
from ..families import family_of
from ..model.decoder import Decoder
from ..model.geometry import structure_of
from ..model.grid import Grid
from ..model.precision import compute_dtype
from ..model.stream import Placement
from ..progress import Progress, logged, silent
from ..text import Text, take_tokens
from .evaluation import Evaluator
from .evaluation.scoring import in_compute_dtype, model_log_perplexity, require_finite
from .reader import Reader
from .run.protocol import Protocol
from .selection import Selection, selection_evaluator
from .tasks import Tasks


def evaluate(
    model: str | Path | PreTrainedModel,
    text: Any = None,
    selection: Selection | Mapping[str, Any] | str | Path | None = None,
    *,
    tasks: Tasks | Sequence[str] | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sequence_length: int = 512,
    tokens: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    placement: Placement | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """What ``ppf eval --json`` prints: "perplexity", "log_perplexity" (nats a token), "protocol", "tasks" and
    circumstances; None for what was not asked.

    ``model`` is a checkpoint (a folder, an id on the hub, a GGUF file), or a transformers model of one of PPF's
    families in memory, on its own device and in its own dtype, with its ``tokenizer`` (token sequences need none).
    ``text`` is anything that :class:`ppf.Text` takes, cut into sequences of ``sequence_length``; sequences int64 [N, T]
    stay as they are. ``tokens`` asks for about so many, evenly spaced, or the first ones of a dataset. With a
    ``selection`` (or its dict, or its JSON file) only those units count: any other tool's mask, scored without surgery.
    ``placement`` says where a checkpoint's weights are kept: if they stream, the model is scored layer by layer.

    ``tasks`` are lm_eval's, by name, or :meth:`ppf.Tasks.open` for a folder of items, a limit and a batch size; they
    need all weights on the device. Raises ``InputError`` for anything wrong with the arguments.
    """
    if text is None and tasks is None:
        raise InputError("text", None, "and tasks are both missing", "Give a text, tasks, or both")
    target_device, progress = str(checkpoint.resolve_device(device)), logged(progress)
    selection = _selection(selection, model)
    if tokenizer is not None and not isinstance(model, PreTrainedModel):
        raise InputError("tokenizer", type(tokenizer).__name__, "is given, and this model has its own", "Drop it")
    opened = None if tasks is None else _opened(tasks, model, tokenizer, selection)
    sequences, protocol = (None, None) if text is None else _read(model, tokenizer, text, sequence_length, tokens)
    target = _target(model, selection is not None, target_device, dtype, placement or Placement())
    start, value, kept, judged = time.perf_counter(), None, None, None
    if opened is not None:
        opened.check(target.config.max_position_embeddings, isinstance(target, PreTrainedModel))
    with _inference(target):
        if selection is not None:
            value, kept = _selected(target, selection, sequences)
        elif sequences is not None:
            value = log_perplexity_of(target, sequences, progress)
        if opened is not None:
            judged = _figures(opened, target, tokenizer or checkpoint.load_tokenizer(model), progress)
    return {
        "model": str(getattr(model, "name_or_path", model)),
        "from": {"kind": "memory"} if isinstance(model, PreTrainedModel) else checkpoint.locate(model).source,
        "perplexity": None if value is None else math.exp(value),
        "log_perplexity": value,
        "tasks": judged,
        "selection": kept,
        "protocol": None if protocol is None else protocol.to_dict(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "seconds": time.perf_counter() - start,
    }


def load_for_computing(model: str | Path, device: str, dtype: str) -> PreTrainedModel:
    """The model in ``dtype``; "auto" is the stored one, or float32 where the device does not compute in it."""
    loaded = checkpoint.load(model, str(checkpoint.resolve_device(device)), dtype)
    return in_compute_dtype(loaded) if dtype == "auto" else loaded


def computing(target: PreTrainedModel | Decoder) -> PreTrainedModel | Decoder:
    """``target`` in its own dtype, or in float32 where its device does not compute in that."""
    if isinstance(target, PreTrainedModel):
        return in_compute_dtype(target)
    return target.to(compute_dtype(target.dtype, target.device))


def log_perplexity_of(
    target: PreTrainedModel | Decoder, sequences: Tensor, progress: Progress = silent, scored: Tensor | None = None
) -> float:
    """Nats a token of int64 ``sequences`` [N, T], or of the tokens ``scored``, bool [N, T]: of a model by its own
    forward pass, of a decoder layer by layer.

    Raises what :func:`ppf.fitting.evaluation.scoring.model_log_perplexity` raises.
    """
    if isinstance(target, PreTrainedModel):
        return model_log_perplexity(target, sequences, progress, scored)
    grid = Grid(target.structure, 1)
    value = Evaluator(target, grid, sequences, scored=scored).log_perplexity(grid.dense())
    require_finite(value, target.dtype)
    progress("score", sequences.numel(), sequences.numel())
    return value


def _read(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: Any, length: int,
    tokens: int | None,
) -> tuple[Tensor, Protocol]:  # fmt: skip
    most = None if tokens is None else max(1, tokens // length)
    reading = _reader(model, tokenizer, Text.of(text).given, length).read(text, most=most)
    sequences = take_tokens(reading.sequences, tokens).long()
    part = reading.part(len(sequences) == len(reading.sequences))
    return sequences, Protocol.of_reading(reading, sequences, part)


def _reader(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, given: Any, length: int
) -> Reader:
    """What reads ``given`` for ``model``; sequences need neither a tokenizer nor a length."""
    in_memory = isinstance(model, PreTrainedModel)
    if isinstance(given, Tensor) and (given.dim() == 2 or (in_memory and tokenizer is None)):
        require_sequences(given)
        return Reader(None, _config(model).vocab_size, given.shape[1], None)
    if not in_memory:
        return Reader.of(model, length)
    return Reader.with_tokenizer(model.config, _required(tokenizer, "this text needs"), length)


def _required(tokenizer: PreTrainedTokenizerBase | None, why: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        problem = f"is missing: a model in memory has none, and {why} one"
        raise InputError("tokenizer", None, problem, "Give tokenizer=AutoTokenizer.from_pretrained(...)")
    return tokenizer


def require_sequences(text: Tensor) -> None:
    """Raise ``InputError`` unless ``text`` are token sequences."""
    if text.dim() != 2 or text.dtype not in (torch.int64, torch.int32) or text.shape[1] < 2:
        given = f"{text.dtype} {list(text.shape)}"
        raise InputError("text", given, "are not token sequences", "Give int64 [N, T], T at least 2")


def _opened(
    tasks: Tasks | Sequence[str] | str,
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    selection: Selection | None,
) -> Tasks:
    """The tasks, before any work. Raises ``InputError`` for what cannot be judged by tasks."""
    if selection is not None:
        remedy = "Score the selection on a text, or prune and judge the result"
        raise InputError("selection", "given", "is not possible with tasks", remedy)
    if isinstance(model, PreTrainedModel):
        _required(tokenizer, "tasks need")
    return tasks if isinstance(tasks, Tasks) else Tasks.open(tasks)


def _figures(
    tasks: Tasks, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> dict[str, Any]:
    """What ``tasks`` say: in the first process, to all."""
    return ranks.from_first(lambda: tasks.score(target, tokenizer, progress))


def _selection(
    selection: Selection | Mapping[str, Any] | str | Path | None, model: str | Path | PreTrainedModel
) -> Selection | None:
    """The units that count, of those that ``model`` has."""
    if isinstance(selection, (str, Path)):
        selection = Selection.read(selection)
    elif isinstance(selection, Mapping):
        selection = Selection.from_dict(dict(selection))
    if selection is not None:
        config = _config(model)
        selection.check(structure_of(family_of(config.model_type), config))
    return selection


def _config(model: str | Path | PreTrainedModel) -> PreTrainedConfig:
    return model.config if isinstance(model, PreTrainedModel) else read_config(checkpoint.local_folder(model))


@contextmanager
def _inference(target: PreTrainedModel | Decoder) -> Iterator[None]:
    """Without dropout, of a caller's model in training too, which is left as it was."""
    modules = target.modules() if isinstance(target, PreTrainedModel) else ()
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _target(
    model: str | Path | PreTrainedModel, as_decoder: bool, device: str, dtype: str, placement: Placement
) -> PreTrainedModel | Decoder:
    """What is scored, in the dtype in which it is: a model, or its plain weights for a selection or if they stream."""
    if isinstance(model, PreTrainedModel):
        return Decoder.of_model(model) if as_decoder else model
    load = checkpoint.load_decoder if as_decoder else checkpoint.load_or_stream
    found = load(model, device, dtype, placement)
    return computing(found) if dtype == "auto" else found


def _selected(decoder: Decoder, selection: Selection, sequences: Tensor) -> tuple[float, dict[str, Any]]:
    """Log-perplexity of a selection, and what is to be said of it."""
    evaluator = selection_evaluator(decoder, selection, sequences)
    policy = selection.policy
    return evaluator.log_perplexity(policy), {"ratio": evaluator.grid.ratio(policy), "policy": policy.to_dict()}
