"""The shapes that benchmarks share: real models' configurations, and random weights for them."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ppf.families import family_of
from ppf.model.build import build, expected_tensors
from ppf.model.classes import stock_classes
from ppf.model.decoder import Decoder
from ppf.model.geometry import structure_of
from ppf.model.structure import Structure

_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "head_dim": 128, "num_attention_heads": 32}
SHAPES: dict[str, dict] = {
    "ref-14m": {
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 16, "head_dim": 32, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 768, "vocab_size": 4096,
    },
    "smollm2-135m": {
        "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "head_dim": 64, "num_attention_heads": 9,
        "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "head_dim": 64, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256,
    },
    "qwen2.5-32b": {
        "model_type": "qwen2", "hidden_size": 5120, "num_hidden_layers": 64, "head_dim": 128,
        "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 27648, "vocab_size": 152064,
    },
    "llama-3.1-70b": {
        "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "head_dim": 128,
        "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256,
    },
    "1b": {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 32000,
    },
    "llama-2-7b": _7B | {
        "model_type": "llama", "num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000,
    },
    "llama-3-8b": _7B | {
        "model_type": "llama", "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "head_dim": 128,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    },
    "qwen3-8b": {
        "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12288, "vocab_size": 151936,
    },
}  # fmt: skip


def config_of(name: str, keep: float = 1.0, **changes: object) -> PreTrainedConfig:
    """The configuration of a shape with the share ``keep`` of every layer's kv-groups and channels (in steps of 64)."""
    fields = dict(SHAPES[name])
    family = family_of(fields.pop("model_type"))
    group = fields["num_attention_heads"] // fields["num_key_value_heads"]
    fields["num_key_value_heads"] = round(fields["num_key_value_heads"] * keep)
    fields["num_attention_heads"] = fields["num_key_value_heads"] * group
    fields["intermediate_size"] = round(fields["intermediate_size"] * keep / 64) * 64
    common = {"max_position_embeddings": 4096, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
    return stock_classes(family)["Config"](**common, **fields, **changes)


def structure(name: str) -> Structure:
    """The structure of a shape."""
    config = config_of(name)
    return structure_of(family_of(config.model_type), config)


def random_model(name: str, keep: float = 1.0, device: str = "cuda", **changes: object) -> PreTrainedModel:
    """Random weights in bf16, small enough that activations stay finite."""
    config = config_of(name, keep, **changes)
    generator, state = torch.Generator(device).manual_seed(0), {}
    for tensor, size in expected_tensors(config).items():
        empty = torch.empty(size, dtype=torch.bfloat16, device=device)
        state[tensor] = empty.fill_(1) if "norm" in tensor else empty.normal_(0, 0.02, generator=generator)
    return build(config, state, torch.bfloat16)


def random_decoder(name: str, device: str = "cuda") -> Decoder:
    """The same as a decoder."""
    return Decoder.of_model(random_model(name, device=device))
