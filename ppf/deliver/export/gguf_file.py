"""GGUF files for llama.cpp and everything built on it: metadata, tokenizer and weights in one file."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ...errors import InputError
from ...storage.files import new_directory, require_space
from .gguf_architectures import Architecture, architecture_of, context_length
from .gguf_metadata import describe_model, describe_tokenizer, model_name
from .gguf_rope import Rotation, rotation_of
from .gguf_tokenizer import Vocabulary, vocabulary
from .gguf_weights import planned, weights, written_widths
from .hf import stands, write_report
from .source import Source, check_destination

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = ("f32", "f16", "bf16", "q8_0")
# Metadata and tokenizer beside the weights: generously Gemma's vocabulary, or Llama 3's with its merges.
_METADATA = 64 << 20
Plan = list[tuple[str, tuple[int, ...]]]


def to_gguf(source: Source, output: str | Path, dtype: str = "f16", force: bool = False) -> dict[str, Any]:
    """Write ``output``/model-``dtype``.gguf; returns what ``ppf.json`` beside it says about the export.

    ``dtype`` is f32, f16, bf16 or q8_0, for matrices; norms, biases and rope factors are always f32, and matrices whose
    rows are no multiple of q8_0's block of 32 are f16 there. Raises ``InputError``, before anything is written, for
    what :func:`require_runnable` refuses, and for a full disk.
    """
    gguf = _library()
    if dtype not in TYPES:
        raise InputError("dtype", dtype, "is no type of GGUF that PPF writes", f"Use one of {list(TYPES)}")
    check_destination(source, output, force)
    architecture, rotation, words = require_runnable(source)
    plan = planned(source, architecture, rotation)
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model_name(source.folder.resolve().name, words))
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == 'f32' else 'MOSTLY'}_{dtype.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe_model(writer, source, architecture, rotation)
    describe_tokenizer(writer, words)
    facts = {"format": "gguf", "architecture": architecture.name, "dtype": dtype, "file": f"model-{dtype}.gguf"}
    length = context_length(source, architecture)
    if length < source.config.max_position_embeddings:
        facts["context_length"] = length
    if source.is_tower:
        facts["part"] = "text tower"
    if not force and stands(output, source, facts):
        return facts
    with new_directory(output, force) as folder:
        require_space(output, sum(_bytes(shape, _kind(shape, dtype)) for _, shape in plan) + _METADATA)
        _write(writer, folder / facts["file"], plan, weights(source, architecture, rotation), dtype)
        write_report(folder, source, facts)
    return facts


def require_runnable(source: Source) -> tuple[Architecture, Rotation, Vocabulary]:
    """How llama.cpp runs ``source``. Raises ``InputError`` for a family, arithmetic, rotation, geometry or tokenizer
    that it would not run as transformers does."""
    architecture = architecture_of(source)
    written_widths(source, architecture)
    rotation = rotation_of(source, architecture)
    return architecture, rotation, vocabulary(source.tokenizer, source.config, source.ends)


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        remedy = "Install it: pip install 'ppf[export]'"
        raise InputError("to", "gguf", f"needs the gguf package ({error})", remedy) from None
    return gguf


def _kind(shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    """The type a weight is written in."""
    gguf = _library()
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return gguf.GGMLQuantizationType.F16 if shape[-1] % block else kind


def _bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = _library().GGML_QUANT_SIZES[kind]
    return prod(shape) // block * size


def _write(writer: GGUFWriter, path: Path, plan: Plan, tensors: Any, dtype: str) -> None:
    """Header, metadata, then one weight at a time, so that only one layer is in memory."""
    for name, shape in plan:
        kind = _kind(shape, dtype)
        # float32 says that the shape is in elements, not that the data are.
        writer.add_tensor_info(name, shape, np.dtype(np.float32), _bytes(shape, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for (name, shape), (_, tensor) in zip(plan, tensors, strict=True):
            writer.write_tensor_data(_encoded(name, tensor, _kind(shape, dtype)))
    finally:
        writer.close()


def _encoded(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """The weight in the bytes of ``kind``. Raises ``InputError`` where float16 would hold an infinity."""
    gguf, data = _library(), tensor.float().contiguous().numpy()
    if kind is gguf.GGMLQuantizationType.F16 and np.abs(data).max() > np.finfo(np.float16).max:
        raise InputError("dtype", "f16", f"{name} overflows in it", "Use bf16 or f32")
    return gguf.quants.quantize(data, kind)
