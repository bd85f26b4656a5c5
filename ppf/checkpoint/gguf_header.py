"""What a GGUF file says its model is, as transformers' configuration of it.

Read off llama.cpp's src/models/, whose graphs have constants of their own beside what a file states. A statement that
is not known here is refused, never dropped: it might change what the model computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import InputError
from ..families import family_of
from ..model.build import expected_tensors
from ..model.classes import stock_classes
from .blame import attempt
from .bounds import MOST_LAYERS

ROPE_FACTORS = "rope_freqs.weight"
REMEDY = "Use the model's safetensors: its folder, or its id on the hub"
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Beside the fields: what is taken into account below, what only repeats the weights' shapes, and what says nothing.
_KNOWN = {
    *(_FIELDS.keys() | {"attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size"}),
    *("rope.freq_base", "rope.freq_base_swa", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned", "attention.sliding_window"),
    *("attention.sliding_window_pattern", "attn_logit_softcapping", "final_logit_softcapping", "tensor_data_layout"),
}
_WORDS = "rope.scaling.type", "tensor_data_layout"
_REAL = {
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
}
_LARGEST = 2**31
_MODEL_TYPES = {name: name for name in ("llama", "qwen2", "qwen3", "gemma2", "phi3")} | {"gemma3": "gemma3_text"}
# Every so many layers one looks at everything, where the file does not say.
_PATTERN = {"gemma2": 2, "gemma3": 6}
# Layers for which llama.cpp computes the score scale of Gemma 27B from the heads, not from the head size.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
# As all Llama 3 have them; the factor itself can be read off.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Header:
    """``fields``: metadata by name. ``shapes``: of all tensors, by their GGUF names, as torch has them."""

    file: Path
    fields: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    def own(self, name: str, default: Any = None) -> Any:
        """A statement about the architecture."""
        return self.fields.get(f"{self.architecture}.{name}", default)

    def refuse(self, name: str, value: Any, problem: str) -> InputError:
        return InputError(f"GGUF {name}", value, f"{problem} ({self.file})", REMEDY)


def config_of(header: Header, rope_factors: Tensor | None) -> PreTrainedConfig:
    """The configuration of ``header``'s model; ``rope_factors`` is what :data:`ROPE_FACTORS` holds, fp32 [head/2].

    Raises ``InputError`` for an architecture that PPF does not read, for fields that are not there, and for what cannot
    be said in transformers' terms.
    """
    model_type = _MODEL_TYPES.get(header.architecture)
    if model_type is None:
        problem = f"PPF reads GGUF files of {', '.join(sorted(_MODEL_TYPES))} only"
        raise header.refuse("general.architecture", header.architecture, problem)
    _require_known(header)
    stated = {field: _stated(header, name) for name, field in _FIELDS.items()}
    if (layers := stated["num_hidden_layers"]) > len(header.shapes):
        raise header.refuse("block_count", layers, f"the file has {len(header.shapes)} tensors in all")
    if "token_embd.weight" not in header.shapes:
        raise InputError("GGUF file", header.file, "lacks tensor token_embd.weight", "Get a complete file")
    if (layers := stated["num_hidden_layers"]) > MOST_LAYERS:
        raise header.refuse("block_count", layers, f"is more than the {MOST_LAYERS:,} layers that PPF takes")
    heads, hidden = stated["num_attention_heads"], stated["hidden_size"]
    size = header.own("attention.key_length", hidden // heads)
    if header.own("attention.value_length", size) != size:
        raise header.refuse("attention.value_length", header.own("attention.value_length"), f"is not {size}, as keys'")
    stated |= {
        "vocab_size": header.shapes["token_embd.weight"][0],
        "num_key_value_heads": header.own("attention.head_count_kv", heads),
        "tie_word_embeddings": "output.weight" not in header.shapes,
    }
    if not isinstance(stated["num_key_value_heads"], int):
        raise header.refuse("attention.head_count_kv", "a list", "layers have widths of their own")
    for name, field in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        stated[field] = header.fields.get(f"tokenizer.ggml.{name}_token_id")
    config_class = stock_classes(family_of(model_type))["Config"]
    if hasattr(config_class, "head_dim") or size * heads != hidden:
        stated["head_dim"] = size
    stated |= _OWN.get(header.architecture, _plain)(header, size, stated, rope_factors)
    return attempt(header.file, stated, partial(_built, config_class))


def _built(config_class: type[PreTrainedConfig], fields: Mapping[str, Any]) -> PreTrainedConfig:
    config = config_class(**fields)
    expected_tensors(config)  # sizes that make no model fail here
    return config


def _require_known(header: Header) -> None:
    prefix = f"{header.architecture}."
    for name in ("general.architecture", *(f"tokenizer.ggml.{token}_token_id" for token in ("bos", "eos", "padding"))):
        if not isinstance(header.fields.get(name, 0 if "token" in name else ""), int if "token" in name else str):
            raise header.refuse(name, header.fields[name], "is not what belongs here")
    for name, value in header.fields.items():
        if name.startswith(prefix) and not _fits(name.removeprefix(prefix), value):
            raise header.refuse(name, value, "is no number that belongs here")
        if name.startswith(prefix) and name.removeprefix(prefix) not in _KNOWN and value not in (0, 1.0, False):
            raise header.refuse(name, str(value)[:80], "PPF does not know what to make of it")
    if (parts := header.fields.get("split.count", 1)) > 1:
        remedy = "Put them together with llama-gguf-split --merge"
        raise InputError("model", header.file, f"is one of {parts} parts of a model", remedy)


def _fits(name: str, value: Any) -> bool:
    """Whether an own statement's value is of its kind: words, finite numbers, sizes or lists of sizes."""
    if name in _WORDS:
        return isinstance(value, str)
    if name in _REAL:
        return isinstance(value, int | float) and math.isfinite(value) and value >= 0
    if name not in _KNOWN:
        return True
    sizes = value if isinstance(value, list) else [value]
    return all(isinstance(size, int) and 0 <= size < _LARGEST for size in sizes)


def _stated(header: Header, name: str) -> Any:
    value = header.own(name)
    if isinstance(value, list):
        raise header.refuse(name, "a list", "layers have widths of their own, which PPF reads from safetensors only")
    if not isinstance(value, int | float) or value <= 0:
        raise header.refuse(name, value, "is missing or no size")
    return value


def _plain(header: Header, size: int, stated: Mapping[str, Any], factors: Tensor | None) -> dict[str, Any]:
    """Llama and Qwen: what a file may say beside sizes is about the rotation, and biases."""
    _require_whole_rotation(header, size)
    if header.own("attention.sliding_window"):
        raise header.refuse("attention.sliding_window", header.own("attention.sliding_window"), "is not read here")
    own = {"rope_parameters": _rotation(header, size, stated, factors)}
    if header.architecture == "llama":
        own["attention_bias"] = "blk.0.attn_output.bias" in header.shapes
        own["mlp_bias"] = "blk.0.ffn_down.bias" in header.shapes
    return own


def _phi3(header: Header, size: int, stated: Mapping[str, Any], factors: Tensor | None) -> dict[str, Any]:
    rotated, window = header.own("rope.dimension_count", size), header.own("attention.sliding_window", 0)
    rotation = _rotation(header, size, stated, factors) | {"partial_rotary_factor": rotated / size}
    return {
        "rope_parameters": rotation,
        "sliding_window": window if 0 < window < stated["max_position_embeddings"] else None,
    }


def _gemma(header: Header, size: int, stated: Mapping[str, Any], factors: Tensor | None) -> dict[str, Any]:
    _require_whole_rotation(header, size)
    name, layers = header.architecture, stated["num_hidden_layers"]
    window = header.own("attention.sliding_window", 4096 if name == "gemma2" else 0)
    pattern = header.own("attention.sliding_window_pattern", _PATTERN[name])
    local = pattern if isinstance(pattern, list) else [bool(pattern and (i + 1) % pattern) for i in range(layers)]
    large = layers == _GEMMA_27B[name]
    rotation = _rotation(header, size, stated, factors)
    if name == "gemma3":
        near = {"rope_type": "default", "rope_theta": header.own("rope.freq_base_swa", 1e4)}
        rotation = {"full_attention": rotation, "sliding_attention": near}
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if name == "gemma2" else {}
    return {
        "sliding_window": window or 4096,
        "layer_types": ["sliding_attention" if window and near else "full_attention" for near in local],
        "query_pre_attn_scalar": stated["hidden_size"] // stated["num_attention_heads"] if large else size,
        "attn_logit_softcapping": header.own("attn_logit_softcapping", caps.get("attn_logit_softcapping")),
        "final_logit_softcapping": header.own("final_logit_softcapping", caps.get("final_logit_softcapping")),
        "rope_parameters": rotation,
    }


def _require_whole_rotation(header: Header, size: int) -> None:
    if (rotated := header.own("rope.dimension_count", size)) != size:
        raise header.refuse("rope.dimension_count", rotated, f"is not the head size, {size}")


def _rotation(header: Header, size: int, stated: Mapping[str, Any], factors: Tensor | None) -> dict[str, Any]:
    base, kind = header.own("rope.freq_base", 1e4), header.own("rope.scaling.type", "none")
    found = {"rope_type": "default", "rope_theta": base}
    if factors is not None:
        return found | _scaled(header, size, found, factors)
    if kind == "none" or header.own("rope.scaling.factor", 0) in (0, 1):
        return found
    if kind not in ("linear", "yarn"):
        raise header.refuse("rope.scaling.type", kind, "PPF does not read this rotation")
    found |= {"rope_type": kind, "factor": header.own("rope.scaling.factor")}
    if kind == "yarn":
        original = header.own("rope.scaling.original_context_length", stated["max_position_embeddings"])
        found["original_max_position_embeddings"] = original
    return found


def _scaled(header: Header, size: int, plain: Mapping[str, Any], factors: Tensor) -> dict[str, Any]:
    """What makes transformers divide the ``plain`` rotation's frequencies by ``factors`` [size/2]."""
    largest = float(factors.max())
    if torch.allclose(factors, factors[:1].expand_as(factors), rtol=1e-5):
        return {} if abs(largest - 1) < 1e-5 else {"rope_type": "linear", "factor": largest}
    llama3 = {"rope_type": "llama3", "factor": round(largest, 4)} | _LLAMA3
    wanted = plain["rope_theta"] ** -(torch.arange(0, size, 2).double() / size) / factors.double()
    shape = {"hidden_size": size, "num_attention_heads": 1, "head_dim": size, "max_position_embeddings": 131072}
    config = stock_classes(family_of("llama"))["Config"](**shape, rope_parameters=dict(plain) | llama3)
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if factors.shape != found.shape or not torch.allclose(found.double(), wanted, rtol=1e-4):
        raise header.refuse(ROPE_FACTORS, list(factors.shape), "are not the factors of a Llama 3")
    return llama3


_OWN: dict[str, Callable[..., dict[str, Any]]] = {"phi3": _phi3, "gemma2": _gemma, "gemma3": _gemma}
