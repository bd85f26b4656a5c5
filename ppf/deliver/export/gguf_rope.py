"""Rotary embeddings in llama.cpp's terms: a base and a factor, or any fixed frequencies as a tensor of factors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...families.traits import rotations
from ...model.classes import stock_classes
from ...model.perlayer import without_layers
from .gguf_architectures import Architecture
from .source import Source

# What llama.cpp divides the angle of an unrotated pair by: far enough from the end of fp32.
_NO_TURN = 1e30
_YARN: dict[str, Any] = {
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
}


@dataclass(frozen=True)
class Rotation:
    """What a file says about the rotation, and what its weights must be multiplied by."""

    base: float
    rotated: int
    """Numbers of a head that the model rotates, the first ones."""
    dimensions: int
    """Numbers of a head that llama.cpp rotates."""
    local_base: float | None = None
    scaling: dict[str, Any] = field(default_factory=dict)
    """``rope.scaling.*``: "type", "factor", "original_context_length"."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Factors [dimensions/2], fp32, by the tensor's name."""
    stretch: float = 1.0
    """What rotated rows of queries and keys are multiplied by."""


def rotation_of(source: Source, architecture: Architecture) -> Rotation:
    """How ``architecture`` is told to rotate as ``source`` does. Raises ``InputError`` for constants it cannot take."""
    parameters = _parameters(source)
    base, kind = parameters["rope_theta"], parameters.get("rope_type", "default")
    rotated = int(source.head_dim * parameters.get("partial_rotary_factor", 1.0))
    local = source.config.rope_parameters.get("sliding_attention") or {}
    dimensions = source.head_dim if architecture.factors else rotated
    if (local_kind := local.get("rope_type", "default")) != "default":
        raise _unlike("rope_type", local_kind, "llama.cpp does not scale the rotation of local layers")
    if kind == "longrope":
        return _long(source, Rotation(base, rotated, dimensions), parameters)
    if not architecture.factors:
        return Rotation(base, rotated, dimensions, local.get("rope_theta"), _scaling(kind, parameters))
    rotary = _rotary(source)
    factors = _factors(rotary.inv_freq, base, dimensions)
    plain = torch.allclose(factors, torch.ones_like(factors), rtol=1e-5)
    tensors = {} if plain else {"rope_freqs.weight": factors}
    return Rotation(base, rotated, dimensions, tensors=tensors, stretch=float(rotary.attention_scaling))


def _parameters(source: Source) -> dict[str, Any]:
    """Of the layers that look furthest, where there are two kinds."""
    return source.config.rope_parameters.get("full_attention") or rotations(source.config)[0]


def _rotary(source: Source) -> Any:
    """transformers' own rotary embedding of ``source``'s model."""
    small = without_layers(source.config)
    small.vocab_size, small.pad_token_id, small.head_dim = 1, None, source.head_dim
    return stock_classes(source.family)["Model"](small).rotary_emb


def _factors(frequencies: Tensor, base: float, dimensions: int) -> Tensor:
    """What divides base^(-2j/dimensions) to give ``frequencies`` [r/2] and then no turn at all; fp32 [dimensions/2]."""
    plain = base ** -(torch.arange(0, dimensions, 2).double() / dimensions)
    factors = torch.full_like(plain, _NO_TURN)
    factors[: len(frequencies)] = plain[: len(frequencies)] / frequencies.double()
    return factors.float()


def _long(source: Source, found: Rotation, parameters: dict[str, Any]) -> Rotation:
    """Two sets of factors: llama.cpp takes the long ones for a context beyond the original, transformers for a text."""
    exponents = torch.arange(0, found.rotated, 2).double() / found.rotated
    tensors = {}
    for name in ("long", "short"):
        frequencies = found.base**-exponents / torch.tensor(parameters[f"{name}_factor"]).double()
        tensors[f"rope_factors_{name}.weight"] = _factors(frequencies, found.base, found.dimensions)
    original = parameters.get("original_max_position_embeddings")
    original = original or source.config.original_max_position_embeddings
    scaling = {"type": "longrope", "original_context_length": original}
    stretch = float(_rotary(source).attention_scaling)
    return Rotation(found.base, found.rotated, found.dimensions, None, scaling, tensors, stretch)


def _scaling(kind: str, parameters: dict[str, Any]) -> dict[str, Any]:
    if kind == "default":
        return {}
    if kind == "linear":
        return {"type": "linear", "factor": parameters["factor"]}
    for name, usual in _YARN.items():
        if parameters.get(name, usual) not in (usual, None):
            raise _unlike(f"rope_parameters.{name}", parameters[name], "this graph of llama.cpp has yarn's usual one")
    original = parameters["original_max_position_embeddings"]
    return {"type": "yarn", "factor": parameters["factor"], "original_context_length": original}


def _unlike(field: str, value: Any, problem: str) -> InputError:
    return InputError(field, value, problem, "Export to hf, which keeps it")
