"""Configurations are other people's files: what is odd in one is found before transformers builds anything from it.

Sizes are compared with the shapes in the safetensors headers, which the files' lengths bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..families import Family
from ..model.build import LAYERS, TIED
from .blame import CORRECT
from .headers import StoredTensor

# How far back attention looks: transformers reads these of any configuration, and only at run time.
_REACHES = "sliding_window", "attention_chunk_size"
_DEEPEST, _MOST_VALUES = 16, 10_000
# Eight times those of the deepest models; each takes a millisecond to look at.
MOST_LAYERS = 1_000
_TOO_LARGE, _LARGEST = 2**63, 2**31


@dataclass(frozen=True)
class Held:
    """What the headers hold: the embedding's [rows, columns], the layers that have tensors, and the largest dimension
    of any of these."""

    rows: int
    columns: int
    layers: int
    widest: int

    @classmethod
    def of(cls, folder: Path, stored: Mapping[str, StoredTensor]) -> Held:
        """Raises ``InputError`` if there is no embedding."""
        embedding = stored.get(TIED[1])
        if embedding is None or len(embedding.shape) != 2:
            problem = f"has no matrix {TIED[1]}"
            raise InputError("checkpoint", folder, problem, "Name the folder of a language model")
        inside = {name: tensor for name, tensor in stored.items() if name.startswith(LAYERS)}
        layers = {name.removeprefix(LAYERS).split(".", 1)[0] for name in inside}
        # Of tensors that have numbers: an empty one may say anything about its other sizes.
        widest = max((size for tensor in inside.values() if tensor.bytes for size in tensor.shape), default=0)
        return cls(*embedding.shape, len(layers), widest)


def require_plain(file: Path, data: Mapping[str, Any]) -> None:
    """Raise ``InputError`` for numbers that are not finite or larger than any tensor's size, for deep nesting, and for
    more values than a configuration has: transformers copies and compares them again and again."""
    values = 0
    for field, value in data.items():
        values += _require_plain(file, field, value, 1)
        if values > _MOST_VALUES:
            raise InputError(field, value, f"is one too many: {file} has more than {_MOST_VALUES:,} values", CORRECT)


def require_sizes(file: Path, data: Mapping[str, Any], family: Family, held: Held, ours: bool) -> None:
    """Raise ``InputError`` for the first size in ``data`` that the headers contradict.

    ``ours``: layers may have widths of their own, and the global fields hold those of the dense model.
    """
    for field, size in (("vocab_size", held.rows), ("hidden_size", held.columns)):
        if field in data and _count(file, field, data[field]) != size:
            problem = f"contradicts the weights, whose embedding is {[held.rows, held.columns]}"
            raise InputError(field, data[field], problem, CORRECT)
    if "num_hidden_layers" in data:
        _require_layers(file, data, held, ours)
    for field in family.width_fields:
        if data.get(field) is not None or (field in data and not _optional(family, field)):
            _require_width(file, field, data[field], _LARGEST if ours else held.widest)
    if data.get("head_dim") is not None:
        _require_width(file, "head_dim", data["head_dim"], held.widest)
    for field in _REACHES:
        if data.get(field) is not None:
            _count(file, field, data[field])
    _require_whole_groups(file, data, family)
    if ours:
        _require_layer_widths(file, data.get("per_layer_config"), held)


def require_ids(file: Path, config: Any) -> None:
    """Raise ``InputError`` for special tokens of ``config`` that its vocabulary does not have; -1 stands for none."""
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, field, None)
        for token in value if isinstance(value, list) else [value]:
            if token is None or token == -1:
                continue
            if type(token) is not int or not 0 <= token < config.vocab_size:
                problem = f"is outside the vocabulary of {config.vocab_size} tokens ({file})"
                raise InputError(field, token, problem, "Set it to a token of the vocabulary, or to null")


def require_rotation(file: Path, config: Any) -> None:
    """Raise ``InputError`` for a rotary embedding of more than a head: transformers would make room for it."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for each in (parameters, *parameters.values()):
        share = each.get("partial_rotary_factor", 1.0) if isinstance(each, dict) else 1.0
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            problem = f"{file} needs a number above 0 and up to 1 here"
            raise InputError("partial_rotary_factor", share, problem, CORRECT)


def _require_plain(file: Path, field: str, value: Any, depth: int) -> int:
    """How many values there are in ``value``."""
    if depth > _DEEPEST:
        raise InputError(field, value, f"is nested deeper than {_DEEPEST} levels in {file}", CORRECT)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(field, value, f"{file} needs a finite number here", CORRECT)
    if isinstance(value, int) and abs(value) >= _TOO_LARGE:
        raise InputError(field, value, f"is larger than any size can be in {file}", CORRECT)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return 1 + sum(
        _require_plain(file, f"{field}.{key}" if depth == 1 else field, inner, depth + 1) for key, inner in items
    )


def _require_layers(file: Path, data: Mapping[str, Any], held: Held, ours: bool) -> None:
    layers = _count(file, "num_hidden_layers", data["num_hidden_layers"])
    # Layers of ours that have lost everything have no tensors, but an entry each.
    own = data.get("per_layer_config")
    without = len(own) if ours and isinstance(own, dict) else 0
    if layers > MOST_LAYERS:
        problem = f"is more than the {MOST_LAYERS:,} layers that PPF takes ({file})"
        raise InputError("num_hidden_layers", layers, problem, "Name a language model")
    if not held.layers <= layers <= held.layers + without:
        problem = f"contradicts the weights, which hold {held.layers} layers ({file})"
        raise InputError("num_hidden_layers", layers, problem, CORRECT)


def _require_width(file: Path, field: str, value: Any, largest: int) -> None:
    if _count(file, field, value) > largest:
        problem = f"contradicts the weights, whose largest layer dimension is {largest} ({file})"
        raise InputError(field, value, problem, CORRECT)


def _require_whole_groups(file: Path, data: Mapping[str, Any], family: Family) -> None:
    for part in family.parts.values():
        counts = {what: field for field, what in part.widths.items()}
        if "heads" not in counts:
            continue
        heads, units = data.get(counts["heads"]), data.get(counts["units"])
        if heads and units and heads % units:
            raise InputError(counts["units"], units, f"does not divide the {heads} attention heads of {file}", CORRECT)


def _require_layer_widths(file: Path, layers: Any, held: Held) -> None:
    """Only what would be absurd to build; whether widths fit each other and the weights is checked with the tensors."""
    overrides = layers.values() if isinstance(layers, dict) else ()
    for fields in overrides:
        for field, value in fields.items() if isinstance(fields, dict) else ():
            if type(value) is int and value > held.widest:
                problem = f"contradicts the weights, whose largest layer dimension is {held.widest} ({file})"
                raise InputError(f"per_layer_config.{field}", value, problem, CORRECT)


def _optional(family: Family, field: str) -> bool:
    """Whether null stands for a value: as many key/value heads as query heads."""
    return any("heads" in part.widths.values() and part.widths.get(field) == "units" for part in family.parts.values())


def _count(file: Path, field: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise InputError(field, value, f"{file} needs a whole number of at least 1 here", CORRECT)
    return value
