"""GGUF files for llama.cpp and everything built on it: metadata, tokenizer and weights in one file."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import InputError
from ...files import new_directory, require_space
from .gguf_tokenizer import Vocabulary, vocabulary
from .gguf_weights import Weight, architecture, weights, written_widths
from .hf import write_report
from .source import Source, check_destination

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = ("f32", "f16", "bf16", "q8_0")
# Metadata and tokenizer beside the weights: generously a Llama 3 vocabulary with its merges.
_METADATA = 64 << 20


def to_gguf(source: Source, output: str | Path, dtype: str = "f16", force: bool = False) -> dict[str, Any]:
    """Write ``output``/model-``dtype``.gguf; returns what ``ppf.json`` beside it says about the export.

    ``dtype`` is f32, f16, bf16 or q8_0, for matrices; norms and rope factors are always f32, and matrices whose rows
    are no multiple of q8_0's block of 32 are f16 there. Raises ``InputError``, before anything is written, for a
    tokenizer, rope scaling or geometry that llama.cpp would not run as transformers does, and for a full disk.
    """
    gguf = _library()
    if dtype not in TYPES:
        raise InputError("dtype", dtype, "is no type of GGUF that PPF writes", f"Use one of {list(TYPES)}")
    check_destination(source, output, force)
    words, tensors = vocabulary(source.tokenizer, source.config), list(weights(source))
    kinds = [_kind(weight, dtype) for weight in tensors]
    writer = gguf.GGUFWriter(None, architecture(source))
    _describe_model(writer, source, dtype)
    _describe_tokenizer(writer, words)
    needed = sum(_bytes(weight, kind) for weight, kind in zip(tensors, kinds, strict=True))
    facts = {"format": "gguf", "architecture": architecture(source), "dtype": dtype, "file": f"model-{dtype}.gguf"}
    with new_directory(output, force) as folder:
        require_space(output, needed + _METADATA)
        _write(writer, folder / facts["file"], tensors, kinds)
        write_report(folder, source, facts)
    return facts


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        remedy = "Install it: pip install 'ppf[export]'"
        raise InputError("to", "gguf", f"needs the gguf package ({error})", remedy) from None
    return gguf


def _describe_model(writer: GGUFWriter, source: Source, dtype: str) -> None:
    gguf, config = _library(), source.config
    widths = written_widths(source)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(source.folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == 'f32' else 'MOSTLY'}_{dtype.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(widths))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    # Said explicitly: by default it would be the hidden size over the heads of layer 0.
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(source.head_dim)
    adders = (writer.add_head_count, writer.add_head_count_kv, writer.add_feed_forward_length)
    for add, counts in zip(adders, zip(*widths, strict=True), strict=True):
        add(counts[0] if source.is_uniform else list(counts))


def _describe_tokenizer(writer: GGUFWriter, words: Vocabulary) -> None:
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


def _kind(weight: Weight, dtype: str) -> GGMLQuantizationType:
    """The type a weight is written in."""
    gguf = _library()
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    if len(weight.shape) == 1:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return gguf.GGMLQuantizationType.F16 if weight.shape[-1] % block else kind


def _bytes(weight: Weight, kind: GGMLQuantizationType) -> int:
    block, size = _library().GGML_QUANT_SIZES[kind]
    return prod(weight.shape) // block * size


def _write(writer: GGUFWriter, path: Path, tensors: list[Weight], kinds: list[GGMLQuantizationType]) -> None:
    """Header, metadata, then one weight at a time, so that only one is in memory."""
    for weight, kind in zip(tensors, kinds, strict=True):
        # float32 says that the shape is in elements, not that the data are.
        writer.add_tensor_info(weight.name, weight.shape, np.dtype(np.float32), _bytes(weight, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight, kind in zip(tensors, kinds, strict=True):
            writer.write_tensor_data(_encoded(weight, kind))
    finally:
        writer.close()


def _encoded(weight: Weight, kind: GGMLQuantizationType) -> np.ndarray:
    """The weight in the bytes of ``kind``. Raises ``InputError`` where float16 would hold an infinity."""
    gguf, data = _library(), weight.read().float().contiguous().numpy()
    if kind is gguf.GGMLQuantizationType.F16 and np.abs(data).max() > np.finfo(np.float16).max:
        raise InputError("dtype", "f16", f"{weight.name} overflows in it", "Use bf16 or f32")
    return gguf.quants.quantize(data, kind)
