"""Is this folder a checkpoint PPF can use? Configuration and headers only; no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from ..errors import InputError
from ..families import KINDS
from ..model.build import LAYERS, check_shapes, expected_tensors
from ..model.frame import Frame
from ..model.geometry import structure_of
from ..model.reference import Reference
from ..timings import timed
from .blame import CORRECT, attempt
from .contents import Contents, make_config, read_contents
from .headers import READ, REPORT, StoredTensor
from .sources import local_folder

__all__ = ["REPORT", "check_checkpoint", "check_contents", "read_config", "stored_tensors"]


def check_checkpoint(path: str | Path) -> PreTrainedConfig:
    """The configuration of a checkpoint that can be pruned: of any registered family, pruned before or not, or the
    text tower of a multimodal model.

    Raises ``InputError`` naming field, value and remedy, or file and tensor, for everything that can be seen without
    reading weights: no such folder, an unknown model type, invalid JSON, fields that contradict the weights or make no
    model, a missing shard, a truncated or damaged safetensors file, tensors absent, unexpected or misshapen. NaN, Inf
    and flipped weight bits are for :func:`ppf.checkpoint.load` and :func:`ppf.checkpoint.verify`.
    """
    return check_contents(local_folder(path)).config


@timed("checking")
def check_contents(folder: Path) -> Contents:
    """What ``folder`` holds, checked as :func:`check_checkpoint` says."""
    contents, file = read_contents(folder), folder / "config.json"
    expected, buffers = attempt(file, contents.data, partial(_try_out, contents))
    _require_tensors(folder, expected, contents.stored)
    for name, buffer in buffers.items():
        if not torch.isfinite(buffer).all():
            parameters = contents.config.rope_parameters
            raise InputError("rope_parameters", parameters, f"give NaN or Inf in {name} ({file})", CORRECT)
    return contents


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration in ``folder``, compared with the sizes in the headers only; the text tower's for a multimodal
    model. Raises ``InputError``."""
    return read_contents(folder).config


def stored_tensors(folder: Path, config: PreTrainedConfig) -> dict[str, StoredTensor]:
    """Every weight of ``config``'s model, found in ``folder``'s headers with the right shape, by the names of a
    text-only model. Raises ``InputError`` as :func:`check_checkpoint` does."""
    stored = check_contents(folder).stored
    _require_tensors(folder, expected_tensors(config), stored)
    return stored


def _require_tensors(folder: Path, expected: Mapping[str, torch.Size], stored: Mapping[str, StoredTensor]) -> None:
    check_shapes(f"checkpoint {folder}, tensor", expected, {name: tensor.shape for name, tensor in stored.items()})
    for name, tensor in stored.items():
        if tensor.dtype not in READ:
            remedy = f"Use weights in one of {list(READ)}, not quantised"
            raise InputError("safetensors file", tensor.file, f"tensor {name} has type {tensor.dtype}", remedy)


def _try_out(contents: Contents, data: Mapping[str, Any]) -> tuple[dict[str, torch.Size], dict[str, torch.Tensor]]:
    """The shapes of the weights that the model of ``data`` needs, and what it computes itself: rotary frequencies.

    Two tokens go through what is around the layers and through a layer of one unit, with weights of zero that take no
    memory to speak of: odd values that no validator looks at fail now, and not after hours of work.
    """
    config = make_config(type(contents.config), data)
    config.tie_word_embeddings = contents.config.tie_word_embeddings
    if len(DynamicCache(config=config).layers) != config.num_hidden_layers:
        raise ValueError("not every layer has its place in the cache")
    expected, structure = expected_tensors(config), structure_of(contents.family, config)
    outer = {name: torch.zeros(()).expand(shape) for name, shape in expected.items() if not name.startswith(LAYERS)}
    frame, tokens = Frame(contents.family, config, outer), torch.zeros(1, 2, dtype=torch.int64)
    frame.model.model(input_ids=tokens, use_cache=True)
    layer = Reference(contents.family, config, structure, frame.attention)
    widths = {kind: min(structure.of(kind)[0].step, structure.of(kind)[0].units) for kind in KINDS}
    weights = {name: torch.zeros(weight.shape) for name, weight in layer.module(0, widths).named_parameters()}
    layer(0, widths, weights, frame.begin(tokens), frame.context(1, 2)[0])
    return expected, dict(frame.model.named_buffers())
