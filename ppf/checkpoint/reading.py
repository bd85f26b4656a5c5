"""Checkpoint folder to model in memory, after every check."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import InputError
from ..model.layout import TIED, build
from .checks import existing_folder, read_config, require_source, stored_tensors
from .hashes import verify
from .headers import StoredTensor, read_json

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TOKENIZER_FILES = "tokenizer.json", "tokenizer.model", "vocab.json"


def load_dense(path: str | Path, device: str = "cpu", dtype: str | torch.dtype = "auto") -> LlamaForCausalLM:
    """The dense model to prune, in eval mode. ``dtype`` "auto" is the config's, else the embedding's.

    Raises ``InputError`` as :func:`check_checkpoint` does, for NaN or Inf weights, for an unknown dtype, and for a
    device that is not there.
    """
    target, folder = resolve_device(device), existing_folder(path)
    config = read_config(folder)
    require_source(folder, config)
    return _load(folder, config, target, dtype)


def load(path: str | Path, device: str = "cpu", dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """Any model that PPF or Hugging Face wrote as Llama, PPFLlama or (uniform results) Mistral, in eval mode.

    Files that ``ppf.json`` lists must have the recorded SHA-256. Raises ``InputError`` as :func:`load_dense` does.
    """
    target, folder = resolve_device(device), existing_folder(path)
    config = read_config(folder)
    verify(folder)
    return _load(folder, config, target, dtype)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``path``. Raises ``InputError`` if it is missing, damaged or knows more ids than the model."""
    folder = existing_folder(path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        remedy = f"Put one of {list(_TOKENIZER_FILES)} there, from the model's own source"
        raise InputError("tokenizer", folder, "holds no tokenizer files", remedy)
    vocabulary = read_config(folder).vocab_size
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for damaged files
        problem = f"cannot be read ({' '.join(str(error).split())[:200]})"
        raise InputError("tokenizer", folder, problem, "Get the tokenizer files again") from error
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocabulary:
        problem = f"has token ids up to {highest}, the model's vocabulary ends at {vocabulary - 1}"
        raise InputError("tokenizer", folder, problem, "Use the tokenizer that the model was trained with")
    return tokenizer


def resolve_device(device: str | torch.device) -> torch.device:
    """``device`` ("auto" is CUDA if there is any, else the CPU). Raises ``InputError`` if it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError("device", device, "is not a device name", "Use cpu, cuda, cuda:N or auto") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if target.type not in ("cpu", "cuda"):
        raise InputError("device", device, "PPF runs on CPU and CUDA only", "Use cpu, cuda, cuda:N or auto")
    if target.type == "cuda" and (target.index or 0) >= count:
        remedy = "Use --device cpu" if count == 0 else f"Use cuda:0 to cuda:{count - 1}"
        raise InputError("device", device, f"is not there: torch {torch.__version__} sees {count} GPUs", remedy)
    return target


def _load(folder: Path, config: PreTrainedConfig, device: torch.device, dtype: str | torch.dtype) -> PreTrainedModel:
    stored = stored_tensors(folder, config)
    wanted = _resolve_dtype(dtype, config, stored)
    state_dict = _read_finite(stored, device, wanted)
    model = build(config, state_dict, wanted, _generation_config(folder))
    model.config._name_or_path = str(folder)
    return model


def _resolve_dtype(dtype: str | torch.dtype, config: PreTrainedConfig, stored: dict[str, StoredTensor]) -> torch.dtype:
    if dtype == "auto":
        dtype = config.dtype or _STORED_DTYPES[stored[TIED[1]].dtype]
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES.values():
        raise InputError("dtype", dtype, "is not supported", f"Use auto or one of {list(DTYPES)}")
    return resolved


def _read_finite(stored: dict[str, StoredTensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors on ``device`` in ``dtype``; one at a time, so that only one exists twice."""
    names = defaultdict(list)
    for name, tensor in stored.items():
        names[tensor.file].append(name)
    tensors = {}
    for file in sorted(names):
        with safe_open(file, framework="pt", device=str(device)) as reader:
            for name in names[file]:
                tensors[name] = _finite(file, name, reader.get_tensor(name), dtype)
    return tensors


def _finite(file: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not _all_finite(tensor):
        problem = f"tensor {name} holds NaN or Inf"
        raise InputError("weights", file, problem, "The file is damaged or the model diverged: get it again")
    cast = tensor.to(dtype)
    # bfloat16 and float32 reach further than float16.
    if dtype is torch.float16 and cast is not tensor and not _all_finite(cast):
        raise InputError("dtype", dtype, f"tensor {name} of {file} overflows in it", "Use bfloat16 or float32")
    return cast


def _all_finite(tensor: Tensor) -> bool:
    # aminmax propagates NaN, and reads bf16 on a CPU several times faster than isfinite().all().
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _generation_config(folder: Path) -> GenerationConfig | None:
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_dict(read_json(file))
    except (ValueError, TypeError) as error:
        raise InputError("file", file, f"transformers refuses it ({error})", "Correct or remove it") from error
