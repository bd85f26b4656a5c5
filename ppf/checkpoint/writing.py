"""Model in memory to a complete checkpoint folder, or to nothing at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import new_directory, require_space, write_json
from .checks import REPORT
from .hashes import hash_folder

# Config, tokenizer and report beside the weights: generously a Llama 3 tokenizer.
_OTHER_FILES = 32 << 20


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    report: dict[str, Any],
    force: bool = False,
) -> None:
    """Write a Hugging Face folder plus ``ppf.json``: ``report`` and, under "files", the SHA-256 of every file.

    All or nothing: the folder appears under its name once it is complete. Raises ``InputError`` if ``path`` exists
    and is not empty (unless ``force``: then it is replaced at the very end), or if the disk is full.
    """
    with new_directory(path, force) as folder:
        require_space(path, model_bytes(model) + _OTHER_FILES)
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_json(folder / REPORT, {**report, "files": hash_folder(folder)})


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters; tied ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
