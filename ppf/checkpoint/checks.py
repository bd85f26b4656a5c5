"""Is this folder a checkpoint PPF can use? Configuration and headers only; no weights are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

from ..errors import InputError
from ..model import PPFLlamaConfig
from ..model.layout import MODEL_CLASSES, TIED, check_shapes, expected_tensors, require_supported
from .headers import StoredTensor, read_headers, read_json

REPORT = "ppf.json"
"""The report beside the weights of everything PPF writes."""

CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {
    config_class.model_type: config_class for config_class in (LlamaConfig, MistralConfig, PPFLlamaConfig)
}

# Old Llama checkpoints hold rotary buffers, which are computed from the config.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_SIZES = "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"


def check_checkpoint(path: str | Path) -> LlamaConfig:
    """The config of a dense checkpoint that can be pruned.

    Sources are plain ``LlamaForCausalLM`` folders. What PPF itself wrote (``ppf_llama``, and the uniform results that
    are ordinary Llamas or Mistrals) can be loaded but not pruned again. Raises ``InputError`` naming file, tensor and
    remedy for everything that can be seen without reading weights: no such folder, another architecture, invalid
    JSON, biases or another activation, a missing shard, a truncated or damaged safetensors file, tensors absent,
    unexpected or misshapen. NaN, Inf and flipped weight bits are for :func:`load_dense` and :func:`verify`.
    """
    folder = existing_folder(path)
    config = read_config(folder)
    require_source(folder, config)
    stored_tensors(folder, config)
    return config


def existing_folder(path: str | Path) -> Path:
    """``path`` as a folder that exists; raises ``InputError``."""
    folder = Path(path)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "no such folder"
        raise InputError("checkpoint", folder, problem, "Name a local Hugging Face folder with config.json")
    return folder


def read_config(folder: Path) -> PreTrainedConfig:
    """The config in ``folder``, of one of ``CONFIG_CLASSES``. Raises ``InputError``."""
    file = folder / "config.json"
    data = read_json(file)
    _require_architecture(file, data)
    _require_sizes(file, data)
    try:
        config = CONFIG_CLASSES[data["model_type"]].from_dict(data)
    except Exception as error:  # transformers and its validators raise many kinds, all about the file's content
        problem = f"transformers refuses it ({_first_line(error)})"
        raise InputError("config", file, problem, "Correct the field it names") from error
    require_supported(config)
    return config


def stored_tensors(folder: Path, config: PreTrainedConfig) -> dict[str, StoredTensor]:
    """Every weight of ``config``'s model, found in ``folder``'s headers with the right shape. Raises ``InputError``."""
    stored = {name: tensor for name, tensor in read_headers(folder).items() if not _IGNORED.fullmatch(name)}
    expected = expected_tensors(config)
    head, embedding = TIED
    if config.tie_word_embeddings and head in stored:  # some checkpoints store a tied head too; build() compares them
        expected[head] = expected[embedding]
    found = {name: tensor.shape for name, tensor in stored.items()}
    check_shapes(f"checkpoint {folder}, tensor", expected, found)
    return stored


def require_source(folder: Path, config: PreTrainedConfig) -> None:
    """Raise ``InputError`` unless ``folder`` is a Llama that PPF has not pruned yet."""
    if (folder / REPORT).exists() or config.model_type == PPFLlamaConfig.model_type:
        remedy = "Give the dense LlamaForCausalLM it was made from; this one can be loaded and run, not pruned again"
        raise InputError("checkpoint", folder, "is already a result of PPF", remedy)
    if config.model_type != LlamaConfig.model_type:
        remedy = "Supported for pruning: LlamaForCausalLM"
        raise InputError("architecture", config.architectures, f"{folder} is no Llama", remedy)


def _require_architecture(file: Path, data: dict[str, Any]) -> None:
    model_type, names = data.get("model_type"), data.get("architectures")
    model_class = MODEL_CLASSES.get(model_type) if isinstance(model_type, str) else None
    if model_class is None or (names and names != [model_class.__name__]):
        supported = "LlamaForCausalLM; what PPF wrote is also loaded: PPFLlamaForCausalLM, MistralForCausalLM"
        raise InputError("architecture", names or model_type, f"{file} is not of a Llama", f"Supported: {supported}")
    if data.get("quantization_config"):
        raise InputError("quantization_config", file, "quantised weights are not supported", "Use the original model")


def _require_sizes(file: Path, data: dict[str, Any]) -> None:
    for field in (*_SIZES, "intermediate_size", "head_dim"):
        value = data.get(field)
        if value is None and field in ("num_key_value_heads", "head_dim"):
            continue
        if type(value) is not int or value < 1:
            raise InputError(field, value, f"{file} needs a whole number of at least 1 here", "Correct the file")
    heads = data["num_attention_heads"]
    if heads % (data.get("num_key_value_heads") or heads):
        problem = f"does not divide the {heads} attention heads of {file}"
        raise InputError("num_key_value_heads", data["num_key_value_heads"], problem, "Correct the file")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
