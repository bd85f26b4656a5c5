"""What a GGUF file says about its model and its tokenizer, beside the weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...families.traits import logit_cap, logit_scale
from .gguf_architectures import Architecture, context_length
from .gguf_rope import Rotation
from .gguf_tokenizer import Vocabulary
from .gguf_weights import written_widths
from .source import Source

if TYPE_CHECKING:
    from gguf import GGUFWriter

_PHI3_TOKENS = {"<s>", "</s>", "<unk>", "<|endoftext|>"}
# Every so many layers one is global, unless the file says otherwise.
_PATTERN = {"gemma2": 2, "gemma3": 6}


def describe_model(writer: GGUFWriter, source: Source, architecture: Architecture, rotation: Rotation) -> None:
    """Widths, rotation, and the constants that the architecture has fields for."""
    config, widths = source.config, written_widths(source, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(source, architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(widths))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    # Said explicitly: by default it would be the hidden size over the heads of layer 0.
    for add in (writer.add_key_length, writer.add_value_length):
        add(source.head_dim)
    adders = (writer.add_head_count, writer.add_head_count_kv, writer.add_feed_forward_length)
    for add, counts in zip(adders, zip(*widths, strict=True), strict=True):
        add(list(counts) if architecture.layered else counts[0])
    _describe_rotation(writer, rotation)
    if architecture.name in _OWN:
        _OWN[architecture.name](writer, source)


def describe_tokenizer(writer: GGUFWriter, words: Vocabulary) -> None:
    """All of ``tokenizer.ggml.*``, and the chat templates."""
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.add_space_prefix)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    for name, index in words.special_ids.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


def model_name(folder: str, words: Vocabulary) -> str:
    """``folder``, so that llama.cpp strips the white space behind special tokens where the tokenizer does.

    It does if Phi-3 is in the name, and then fails to load a vocabulary without four tokens of Phi-3's.
    """
    plain = re.sub("phi-?3", "phi_3", folder, flags=re.IGNORECASE)
    return f"phi-3 {plain}" if words.strips_right and _PHI3_TOKENS.issubset(words.tokens) else plain


def _describe_rotation(writer: GGUFWriter, rotation: Rotation) -> None:
    from gguf import RopeScalingType

    writer.add_rope_freq_base(rotation.base)
    writer.add_rope_dimension_count(rotation.dimensions)
    if rotation.local_base is not None:
        writer.add_rope_freq_base_swa(rotation.local_base)
    if "type" in rotation.scaling:
        writer.add_rope_scaling_type(RopeScalingType(rotation.scaling["type"]))
    if "factor" in rotation.scaling:
        writer.add_rope_scaling_factor(rotation.scaling["factor"])
    if "original_context_length" in rotation.scaling:
        writer.add_rope_scaling_orig_ctx_len(rotation.scaling["original_context_length"])


def _gemma(writer: GGUFWriter, source: Source) -> None:
    config, name = source.config, writer.arch
    if "window" in source.traits:
        writer.add_sliding_window(config.sliding_window)
        local = [kind == "sliding_attention" for kind in config.layer_types]
        # Readers older than the field know the usual pattern only, so that is not written.
        if local != [bool((index + 1) % _PATTERN[name]) for index in range(len(local))]:
            writer.add_sliding_window_pattern(local)
    if "score cap" in source.traits:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if logit_cap(config) is not None:
        writer.add_final_logit_softcapping(logit_cap(config))


def _granite(writer: GGUFWriter, source: Source) -> None:
    config = source.config
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(logit_scale(config))


def _mistral3(writer: GGUFWriter, source: Source) -> None:
    parameters = source.config.rope_parameters
    writer.add_attn_temperature_scale(parameters["llama_4_scaling_beta"])
    writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])


_OWN: dict[str, Callable[[GGUFWriter, Source], None]] = {
    "gemma2": _gemma,
    "gemma3": _gemma,
    "granite": _granite,
    "mistral3": _mistral3,
}
