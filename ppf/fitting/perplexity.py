"""``ppf.evaluate``: the perplexity of a model on a text, as it is or with some of its units only."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import checkpoint
from ..checkpoint.checks import existing_folder, read_config
from ..errors import InputError
from ..families import family_of
from ..model.decoder import Decoder
from ..model.geometry import structure_of
from ..model.grid import Grid
from ..model.precision import compute_dtype
from ..model.stream import Placement
from ..progress import Progress, silent
from ..text import take_tokens
from .evaluation import Evaluator
from .evaluation.scoring import in_compute_dtype, model_log_perplexity, require_finite
from .reader import Reader
from .run.protocol import Protocol
from .selection import Selection, selection_evaluator


def evaluate(
    model: str | Path | PreTrainedModel,
    text: str | Path | Tensor,
    selection: Selection | Mapping[str, Any] | str | Path | None = None,
    *,
    sequence_length: int = 512,
    tokens: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    placement: Placement | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """What ``ppf eval --json`` prints: "perplexity", "log_perplexity" (nats a token), "protocol" and circumstances.

    ``model`` is a checkpoint's folder, or a transformers model of one of PPF's families on its own device and in its
    own dtype; ``text`` a UTF-8 file, or token sequences int64 [N, T] (a loaded model takes only these). ``tokens`` asks
    for about so many, evenly spaced. With a ``selection`` (or its dict, or its JSON file) only those units count: any
    other tool's mask, scored without surgery. ``placement`` says where a folder's weights are kept: if they stream, the
    model is scored layer by layer. Raises ``InputError`` for anything wrong with the arguments.
    """
    target_device = str(checkpoint.resolve_device(device))
    if isinstance(selection, (str, Path)):
        selection = Selection.read(selection)
    elif isinstance(selection, Mapping):
        selection = Selection.from_dict(dict(selection))
    if selection is not None:
        config = model.config if isinstance(model, PreTrainedModel) else read_config(existing_folder(model))
        selection.check(structure_of(family_of(config.model_type), config))
    sequences, protocol = _read(model, text, sequence_length, tokens)
    target = _target(model, selection is not None, target_device, dtype, placement or Placement())
    start = time.perf_counter()
    if selection is None:
        value, kept = log_perplexity_of(target, sequences, progress), None
    else:
        value, kept = _selected(target, selection, sequences)
    return {
        "model": str(getattr(model, "name_or_path", model)),
        "perplexity": math.exp(value),
        "log_perplexity": value,
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
    model: str | Path | PreTrainedModel, text: str | Path | Tensor, length: int, tokens: int | None
) -> tuple[Tensor, Protocol | None]:
    if isinstance(text, Tensor):
        if text.dim() != 2 or text.dtype is not torch.int64 or text.shape[1] < 2:
            given = f"{text.dtype} {list(text.shape)}"
            raise InputError("text", given, "are not token sequences", "Give int64 [N, T], T at least 2")
        return take_tokens(text, tokens), None
    if isinstance(model, PreTrainedModel):
        problem = "needs a tokenizer, which a loaded model has not"
        raise InputError("text", text, problem, "Give token sequences, or the folder of the checkpoint as model")
    reader = Reader.of(model, length)
    packed = reader.sequences(text)
    sequences = take_tokens(packed, tokens)
    part = "all of it" if len(sequences) == len(packed) else "evenly spaced sequences"
    return sequences, Protocol.of_file(text, sequences, part, reader.begin)


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
