"""Model in memory to a complete checkpoint folder, or to nothing at all."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..files import new_directory, require_space, write_json
from ..model.build import TIED
from ..model.tower import PREFIX, wrapper_classes, wrapper_model
from .hashes import hash_folder
from .headers import INDEX, REPORT
from .reading import GENERATION
from .source import Checkpoint
from .weights import read_tensors
from .wrapper import Wrapper

# Config, tokenizer and report beside the weights: generously a Llama 3 tokenizer.
_OTHER_FILES = 32 << 20
_SHARD = "50GB"
# What a tokenizer or processor may consist of, beside JSON.
_COPIED = ".json", ".jinja", ".model", ".txt", ".tiktoken"
_LABELS = "transformers_version", "architectures", "_name_or_path"


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    report: dict[str, Any],
    force: bool = False,
    source: Checkpoint | None = None,
) -> None:
    """Write a Hugging Face folder plus ``ppf.json``: ``report`` and, under "files", the SHA-256 of every file.

    If ``source`` is a multimodal model, so is the result: ``model`` becomes its text tower, all else is copied from it
    (processor and tokenizer files too; ``tokenizer`` is not asked). All or nothing: the folder appears under its name
    once it is complete. Raises ``InputError`` if ``path`` exists and is not empty (unless ``force``: then it is
    replaced at the very end), or if the disk is full.
    """
    passengers = source.passengers.values() if source else ()
    with new_directory(path, force) as folder:
        require_space(path, model_bytes(model) + sum(tensor.bytes for tensor in passengers) + _OTHER_FILES)
        if source is not None and source.wrapper is not None:
            _write_wrapper(model, source, source.wrapper, folder)
        else:
            _write_model(model, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        (folder / GENERATION).write_text(model.generation_config.to_json_string(), encoding="utf-8")
        write_json(folder / REPORT, {**report, "files": hash_folder(folder)})


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters; tied ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _write_model(model: PreTrainedModel, folder: Path) -> None:
    # transformers refuses to write some generation settings that it reads, and that published models come with.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = own


def _write_wrapper(model: PreTrainedModel, source: Checkpoint, wrapper: Wrapper, folder: Path) -> None:
    tower = {wrapper.outside(name): tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tower.pop(wrapper.outside(TIED[0]), None)
    _write_weights(tower | dict(read_tensors(source.passengers)), folder)
    write_json(folder / "config.json", _wrapper_config(model, wrapper))
    for file in source.folder.iterdir():
        ours = file.name in ("config.json", GENERATION, REPORT) or file.name.endswith(".index.json")
        if file.is_file() and file.suffix in _COPIED and not ours:
            shutil.copyfile(file, folder / file.name)


def _wrapper_config(model: PreTrainedModel, wrapper: Wrapper) -> dict[str, Any]:
    """The wrapper's config.json around another tower; its class is of ours if the tower's is."""
    text = json.loads(model.config.to_json_string(use_diff=False))
    text = {name: value for name, value in text.items() if name not in _LABELS}
    stock = wrapper.model_type
    if text["model_type"].startswith(PREFIX):
        model_type, model_class = f"{PREFIX}{stock}", wrapper_classes(stock)["ForConditionalGeneration"]
    else:
        model_type, model_class = stock, wrapper_model(stock)
    data = {name: value for name, value in copy.deepcopy(dict(wrapper.data)).items() if name != "torch_dtype"}
    changed = {"model_type": model_type, "architectures": [model_class.__name__], "text_config": text}
    tied = {"tie_word_embeddings": text["tie_word_embeddings"], "dtype": text["dtype"]}
    return data | changed | tied


def _write_weights(state: dict[str, Any], folder: Path) -> None:
    """As transformers writes them: one file, or shards and their index."""
    split = split_torch_state_dict_into_shards(state, max_shard_size=_SHARD)
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
