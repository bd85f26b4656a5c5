"""``ppf.evaluate``: a model's perplexity on a text, as it is or with some of its units only, and what tasks say."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

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
from ..text import take_tokens
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
    families on its own device and in its own dtype; ``text`` anything that :class:`ppf.Text` takes, of which a loaded
    model takes only token sequences int64 [N, T]. ``tokens`` asks for about so many, evenly spaced, or the first ones
    of a dataset. With a ``selection`` (or its dict, or its JSON file) only those units count: any other tool's mask,
    scored without surgery. ``placement`` says where a checkpoint's weights are kept: if they stream, the model is
    scored layer by layer.

    ``tasks`` are lm_eval's, by name, or :meth:`ppf.Tasks.open` for a folder of items, a limit and a batch size; they
    need a folder with a tokenizer, and all weights on the device. Raises ``InputError`` for anything wrong with the
    arguments.
    """
    if text is None and tasks is None:
        raise InputError("text", None, "and tasks are both missing", "Give a text, tasks, or both")
    target_device, progress = str(checkpoint.resolve_device(device)), logged(progress)
    if isinstance(selection, (str, Path)):
        selection = Selection.read(selection)
    elif isinstance(selection, Mapping):
        selection = Selection.from_dict(dict(selection))
    if selection is not None:
        config = model.config if isinstance(model, PreTrainedModel) else read_config(checkpoint.local_folder(model))
        selection.check(structure_of(family_of(config.model_type), config))
    opened = None if tasks is None else _opened(tasks, model, selection)
    sequences, protocol = (None, None) if text is None else _read(model, text, sequence_length, tokens)
    target = _target(model, selection is not None, target_device, dtype, placement or Placement())
    start, value, kept = time.perf_counter(), None, None
    if opened is not None:
        opened.check(target.config.max_position_embeddings, isinstance(target, PreTrainedModel))
    if selection is not None:
        value, kept = _selected(target, selection, sequences)
    elif sequences is not None:
        value = log_perplexity_of(target, sequences, progress)
    return {
        "model": str(getattr(model, "name_or_path", model)),
        "from": {"kind": "memory"} if isinstance(model, PreTrainedModel) else checkpoint.locate(model).source,
        "perplexity": None if value is None else math.exp(value),
        "log_perplexity": value,
        "tasks": None if opened is None else _figures(opened, target, model, progress),
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


def log_perplexity_of(target: PreTrainedModel | Decoder, sequences: Tensor, progress: Progress = silent) -> float:
    """Nats a token of int64 ``sequences`` [N, T]: of a model by its own forward pass, of a decoder layer by layer.

    Raises what :func:`ppf.fitting.evaluation.scoring.model_log_perplexity` raises.
    """
    if isinstance(target, PreTrainedModel):
        return model_log_perplexity(target, sequences, progress)
    grid = Grid(target.structure, 1)
    value = Evaluator(target, grid, sequences).log_perplexity(grid.dense())
    require_finite(value, target.dtype)
    progress("score", sequences.numel(), sequences.numel())
    return value


def _read(
    model: str | Path | PreTrainedModel, text: Any, length: int, tokens: int | None
) -> tuple[Tensor, Protocol | None]:
    if isinstance(text, Tensor):
        require_sequences(text)
        return take_tokens(text, tokens), None
    if isinstance(model, PreTrainedModel):
        problem = "needs a tokenizer, which a loaded model has not"
        raise InputError("text", text, problem, "Give token sequences, or the folder of the checkpoint as model")
    most = None if tokens is None else max(1, tokens // length)
    reading = Reader.of(model, length).read(text, most=most)
    sequences = take_tokens(reading.sequences, tokens).long()
    part = reading.part(len(sequences) == len(reading.sequences))
    return sequences, Protocol.of_reading(reading, sequences, part)


def require_sequences(text: Tensor) -> None:
    """Raise ``InputError`` unless ``text`` are token sequences."""
    if text.dim() != 2 or text.dtype is not torch.int64 or text.shape[1] < 2:
        given = f"{text.dtype} {list(text.shape)}"
        raise InputError("text", given, "are not token sequences", "Give int64 [N, T], T at least 2")


def _opened(
    tasks: Tasks | Sequence[str] | str, model: str | Path | PreTrainedModel, selection: Selection | None
) -> Tasks:
    """The tasks, before any work. Raises ``InputError`` for what cannot be judged by tasks."""
    if selection is not None:
        remedy = "Score the selection on a text, or prune and judge the result"
        raise InputError("selection", "given", "is not possible with tasks", remedy)
    if isinstance(model, PreTrainedModel):
        problem = "need a tokenizer, which a loaded model has not"
        raise InputError("tasks", "given", problem, "Give the folder of the checkpoint as model")
    return tasks if isinstance(tasks, Tasks) else Tasks.open(tasks)


def _figures(tasks: Tasks, target: PreTrainedModel, model: str | Path, progress: Progress) -> dict[str, Any]:
    """What ``tasks`` say: in the first process, to all."""
    tokenizer = checkpoint.load_tokenizer(model)
    return ranks.from_first(lambda: tasks.score(target, tokenizer, progress))


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
