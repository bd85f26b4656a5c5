"""Checkpoint folder to model in memory, after every check."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .. import ranks
from ..errors import InputError
from ..model.build import build
from ..model.decoder import Decoder
from ..model.stream import Placement
from ..storage.schemas import read_as, require_file
from .blame import attempt
from .bounds import require_plain
from .checks import read_config
from .hashes import verify
from .headers import SETTINGS_BYTES, read_json
from .placing import fits
from .source import Checkpoint
from .sources import local_folder

GENERATION = "generation_config.json"
_TOKENIZER_FILES = "tokenizer.json", "tokenizer.model", "vocab.json"
_TOKENIZER_JSON = (
    *("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
)
_TOKENIZER_AGAIN = "Get the tokenizer files again"


def load(path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """The model in ``path``, in eval mode: of any registered family, dense or pruned; of a multimodal model the text
    tower, as a text-only model. ``dtype`` "auto" is the config's, else the embedding's.

    Files that ``ppf.json`` lists must have the recorded SHA-256. Raises ``InputError`` as :func:`check_checkpoint`
    does, for NaN or Inf weights, for an unknown dtype, and for a device that is not there.
    """
    target, opened = _open(path, device)
    return _model(opened, target, opened.resolve_dtype(dtype))


def load_decoder(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    placement: Placement | None = None,
) -> Decoder:
    """The weights in ``path`` as plain tensors, whatever :func:`load` loads; layers on ``device``, or streamed to it as
    ``placement`` says. Raises ``InputError`` as :func:`load` does; about a layer that streams when it is first read.
    """
    target, opened = _open(path, device)
    return opened.decoder(target, dtype, placement)


def load_or_stream(
    path: str | Path, device: str | torch.device, dtype: str | torch.dtype, placement: Placement
) -> PreTrainedModel | Decoder:
    """The model of :func:`load` if ``placement`` keeps its weights on ``device``, else the :func:`load_decoder` whose
    layers stream. Raises ``InputError`` as these do."""
    target, opened = _open(path, device)
    wanted = opened.resolve_dtype(dtype)
    if fits(opened, target, wanted, placement):
        return _model(opened, target, wanted)
    return opened.decoder(target, wanted, placement)


def load_generation_config(path: str | Path) -> GenerationConfig | None:
    """``generation_config.json`` in ``path``, None if there is none. Raises ``InputError`` if transformers cannot read
    it; what it reads but would not write is taken as it is."""
    file = local_folder(path) / GENERATION
    if not file.is_file():
        return None
    data = read_json(file, SETTINGS_BYTES)
    require_plain(file, data)
    return attempt(file, data, _generation_config)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``path``. Raises ``InputError`` if it is missing or damaged.

    It may know more tokens than the model: :func:`ppf.text.read_tokens` refuses a text that yields one.
    """
    folder = local_folder(path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        remedy = f"Put one of {list(_TOKENIZER_FILES)} there, from the model's own source"
        raise InputError("tokenizer", folder, "holds no tokenizer files", remedy)
    config = read_config(folder)
    try:
        made = AutoTokenizer.from_pretrained(folder, config=config, local_files_only=True, trust_remote_code=False)
        made("a\U0010fffe")  # settings of a wrong kind show when it works, with letters that it does not know too
        return made
    except Exception as error:  # the tokenizers library raises bare Exception for damaged files
        _require_json(folder)
        problem = f"cannot be read ({' '.join(str(error).split())[:200]})"
        raise InputError("tokenizer", folder, problem, _TOKENIZER_AGAIN) from error


def _require_json(folder: Path) -> None:
    """Raise ``InputError`` about the first file of a tokenizer that is no JSON object; the libraries name none."""
    for file in (folder / name for name in _TOKENIZER_JSON):
        if file.exists():
            require_file("tokenizer", file, _TOKENIZER_AGAIN)
            read_as(dict[str, Any], "tokenizer", file, _TOKENIZER_AGAIN)


def resolve_device(device: str | torch.device) -> torch.device:
    """``device`` ("auto" is CUDA if there is any, else the CPU). Raises ``InputError`` if it is not there.

    In a job of several processes "cuda" is each one's own GPU.
    """
    if device == "auto":
        return ranks.device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
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
    return ranks.device(target)


def _open(path: str | Path, device: str | torch.device) -> tuple[torch.device, Checkpoint]:
    target, opened = resolve_device(device), Checkpoint(path)
    verify(opened.folder)
    return target, opened


def _model(opened: Checkpoint, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    generation = load_generation_config(opened.folder)
    return build(copy.deepcopy(opened.config), opened.state(device, dtype), dtype, generation)


def _generation_config(data: Mapping[str, Any]) -> GenerationConfig:
    """Without names that would overwrite methods of transformers' class."""
    usable = {name: value for name, value in data.items() if not callable(getattr(GenerationConfig, name, None))}
    return GenerationConfig.from_dict(usable)
