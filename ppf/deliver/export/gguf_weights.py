"""A Llama's weights as llama.cpp wants them: which architecture, which widths, which rows in which order.

llama.cpp's ``deci`` graph cannot run some policies as they are: it silently skips a layer whose FFN width is 0 together
with its attention; it aborts in generation if the last layer has no FFN; and it takes the head size from layer 0. The
first two are met by an FFN of width 32 that is all zeros, the third by refusing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ...errors import InputError
from .source import LAYER_0, Source

ZERO_FFN = 32
"""Width of an FFN that adds nothing: one block of q8_0."""

_ROPE_TYPES = "default", "linear", "llama3"
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Weight:
    """A tensor to write: its GGUF name, its shape [rows, columns] or [n], and how to get it (fp32 or stored dtype)."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def architecture(source: Source) -> str:
    """ "llama" for uniform results, which every program on GGML runs; "deci" where layers differ."""
    return "llama" if source.is_uniform else "deci"


def needs_zero_ffn(widths: list[tuple[int, int, int]], index: int) -> bool:
    """Whether layer ``index`` must get an FFN of zeros: it has none, but has attention or is the last."""
    heads, _, channels = widths[index]
    return not channels and (heads > 0 or index == len(widths) - 1)


def written_widths(source: Source) -> list[tuple[int, int, int]]:
    """(query heads, kv heads, FFN width) of every layer as the file states them, zero FFNs included.

    Raises ``InputError`` if layer 0 has no attention.
    """
    widths = source.widths
    if not widths[0][0]:
        problem = "llama.cpp takes the head size of all layers from layer 0, which has no attention"
        raise InputError("attention heads of layer 0", 0, problem, LAYER_0)
    return [
        (heads, kv_heads, ZERO_FFN if needs_zero_ffn(widths, index) else channels)
        for index, (heads, kv_heads, channels) in enumerate(widths)
    ]


def rope_rows(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k [heads · head_dim, hidden] in the order of llama.cpp's rope.

    transformers rotates row j of a head with row j + head_dim/2, llama.cpp row 2j with row 2j + 1.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def rope_factors(config: PreTrainedConfig, head_dim: int) -> Tensor | None:
    """What llama.cpp divides the rope's frequencies by, fp32 [head_dim/2]; None if all are 1.

    They are read off the frequencies that transformers computes, whatever the scaling. Raises ``InputError`` for
    scalings that depend on the text's length or change the attention's scale.
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        remedy = f"Supported: {list(_ROPE_TYPES)}; export to hf instead"
        raise InputError("rope_type", kind, "cannot be written as fixed factors of the frequencies", remedy)
    plain = parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    factors = plain / LlamaRotaryEmbedding(config=config).inv_freq.double()
    return None if torch.allclose(factors, torch.ones(()).double(), rtol=1e-5) else factors.float()


def weights(source: Source) -> Iterator[Weight]:
    """Everything the file holds, in layer order."""
    yield _stored(source, "model.embed_tokens.weight")
    factors = rope_factors(source.config, source.head_dim)
    if factors is not None:
        yield Weight("rope_freqs.weight", tuple(factors.shape), lambda: factors)
    for index in range(len(source.widths)):
        yield from _layer(source, index)
    yield _stored(source, "model.norm.weight")
    if not source.config.tie_word_embeddings:
        yield _stored(source, "lm_head.weight")


def _layer(source: Source, index: int) -> Iterator[Weight]:
    (heads, kv_heads, channels), prefix = source.widths[index], f"model.layers.{index}."
    if heads:
        yield _stored(source, prefix + "input_layernorm.weight")
        yield _stored(source, prefix + "self_attn.q_proj.weight", heads)
        yield _stored(source, prefix + "self_attn.k_proj.weight", kv_heads)
        yield _stored(source, prefix + "self_attn.v_proj.weight")
        yield _stored(source, prefix + "self_attn.o_proj.weight")
    if channels:
        for name in ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            yield _stored(source, f"{prefix}{name}.weight")
    elif needs_zero_ffn(source.widths, index):
        yield from _zero_ffn(index, source.config.hidden_size)


def _stored(source: Source, name: str, rope_heads: int = 0) -> Weight:
    def read() -> Tensor:
        weight = source.tensor(name)
        return rope_rows(weight, rope_heads) if rope_heads else weight

    return Weight(gguf_name(name), source.stored[name].shape, read)


def _zero_ffn(index: int, hidden: int) -> Iterator[Weight]:
    shapes = {"ffn_norm": (hidden,), "ffn_gate": (ZERO_FFN, hidden), "ffn_up": (ZERO_FFN, hidden)}
    for name, shape in (shapes | {"ffn_down": (hidden, ZERO_FFN)}).items():
        fill = float(name == "ffn_norm")
        yield Weight(f"blk.{index}.{name}.weight", shape, lambda shape=shape, fill=fill: torch.full(shape, fill))


def gguf_name(name: str) -> str:
    """GGUF's name of a weight of a Hugging Face Llama."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        index, part = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{index}.{_NAMES[part]}.weight"
    return f"{_NAMES[stem]}.weight"
