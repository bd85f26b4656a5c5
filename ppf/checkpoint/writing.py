"""A model, in memory or tensor by tensor, to a complete checkpoint folder, or to nothing at all."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..model.build import LAYERS, expected_tensors, skeleton
from ..model.tower import PREFIX, wrapper_classes, wrapper_model
from ..storage.files import new_directory, require_space, write_json
from .hashes import write_report
from .headers import REPORT
from .reading import GENERATION
from .shards import SHARD_BYTES, write_shards
from .source import Checkpoint
from .weights import read_tensors
from .wrapper import Wrapper

# Config, tokenizer and report beside the weights: generously a Llama 3 tokenizer.
_OTHER_FILES = 32 << 20
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
    """Write a Hugging Face folder plus ``ppf.json``: ``report`` and what :func:`ppf.checkpoint.verify` goes by.

    If ``source`` is a multimodal model, so is the result: ``model`` becomes its text tower, all else is copied from it
    (processor and tokenizer files too; ``tokenizer`` is not asked). All or nothing: the folder appears under its name
    once it is complete. Raises ``InputError`` if ``path`` exists and is not empty (unless ``force``: then it is
    replaced at the very end), or if the disk is full.
    """
    names = expected_tensors(model.config)
    state = ((name, tensor) for name, tensor in model.state_dict().items() if name in names)
    with _result(path, model_bytes(model), force, source) as folder:
        if source is not None and source.wrapper is not None:
            _write_wrapper(model.config, model.dtype, state, source, source.wrapper, folder, SHARD_BYTES)
        else:
            write_shards(folder, _sizes(model.config, model.dtype), state)
            _write_config(model, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        (folder / GENERATION).write_text(model.generation_config.to_json_string(), encoding="utf-8")
        write_report(folder, report)


def save_stream(
    config: PreTrainedConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    path: str | Path,
    report: Callable[[Path], dict[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation: GenerationConfig | None = None,
    force: bool = False,
    source: Checkpoint | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """As :func:`save`, of ``config``'s model, which is never held: ``tensors`` in ``dtype``, layer by layer and then
    what lies outside (a tied head left out), are written as they come, in files of about ``shard_bytes``.

    ``report`` is given the folder with everything but its ``ppf.json``, so that it can measure what was written; what
    it gives is returned. Without a ``generation`` the folder says what ``config`` implies.
    """
    model = skeleton(copy.deepcopy(config), dtype)
    with _result(path, model_bytes(model), force, source) as folder:
        if source is not None and source.wrapper is not None:
            _write_wrapper(model.config, dtype, tensors, source, source.wrapper, folder, shard_bytes)
        else:
            write_shards(folder, _sizes(model.config, dtype), tensors, shard_bytes)
            _write_config(model, folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        said = generation or model.generation_config
        (folder / GENERATION).write_text(said.to_json_string(), encoding="utf-8")
        found = report(folder)
        write_report(folder, found)
    return found


def save_plain(
    config: PreTrainedConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    finish: Callable[[Path], None],
) -> None:
    """Write ``config``'s model as others publish theirs, without a report: ``tensors``, layer by layer and then what
    lies outside, become ``dtype``. All or nothing, as :func:`save`; ``finish`` may add to the folder, and
    refuse it, before it appears.
    """
    model = skeleton(copy.deepcopy(config), dtype)
    with _result(path, model_bytes(model), False, None) as folder:
        converted = ((name, tensor.to(dtype)) for name, tensor in tensors)
        write_shards(folder, _sizes(model.config, dtype), converted, SHARD_BYTES, marked=False)
        _write_config(model, folder)
        tokenizer.save_pretrained(folder)
        finish(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Write a ``model`` in memory as others publish theirs, without a report. All or nothing, as :func:`save`."""
    with _result(path, model_bytes(model), False, None) as folder:
        _write_model(model, folder)
        tokenizer.save_pretrained(folder)
        (folder / GENERATION).write_text(model.generation_config.to_json_string(), encoding="utf-8")


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters; tied ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@contextmanager
def _result(path: str | Path, size: int, force: bool, source: Checkpoint | None) -> Iterator[Path]:
    """The folder to fill with a model of ``size`` bytes and what ``source`` has beside its own."""
    passengers = source.passengers.values() if source else ()
    with new_directory(path, force) as folder:
        require_space(path, size + sum(tensor.bytes for tensor in passengers) + _OTHER_FILES)
        yield folder


def _write_model(model: PreTrainedModel, folder: Path) -> None:
    # transformers refuses to write some generation settings that it reads, and that published models come with.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    finally:
        model.generation_config = own


def _write_config(model: PreTrainedModel, folder: Path) -> None:
    """As ``save_pretrained`` of the model does."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def _sizes(config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of all weights in the order in which they are written: layers ascending, then what lies outside."""
    sizes = {name: prod(shape) * dtype.itemsize for name, shape in expected_tensors(config).items()}
    return dict(sorted(sizes.items(), key=lambda item: not item[0].startswith(LAYERS)))


def _write_wrapper(
    config: PreTrainedConfig, dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]], source: Checkpoint,
    wrapper: Wrapper, folder: Path, shard_bytes: int,
) -> None:  # fmt: skip
    """The multimodal model of ``source`` around the tower that ``config`` and ``tensors`` are."""
    sizes = {wrapper.outside(name): size for name, size in _sizes(config, dtype).items()}
    passengers = {name: tensor.bytes for name, tensor in source.passengers.items()}
    tower = ((wrapper.outside(name), tensor) for name, tensor in tensors)
    write_shards(folder, sizes | passengers, chain(tower, read_tensors(source.passengers)), shard_bytes)
    write_json(folder / "config.json", _wrapper_config(config, wrapper))
    for file in source.folder.iterdir():
        ours = file.name in ("config.json", GENERATION, REPORT) or file.name.endswith(".index.json")
        if file.is_file() and file.suffix in _COPIED and not ours:
            shutil.copyfile(file, folder / file.name)


def _wrapper_config(config: PreTrainedConfig, wrapper: Wrapper) -> dict[str, Any]:
    """The wrapper's config.json around another tower; its class is of ours if the tower's is."""
    text = json.loads(config.to_json_string(use_diff=False))
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
