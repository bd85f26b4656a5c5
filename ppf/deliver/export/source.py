"""What an export starts from: a verified checkpoint and the widths of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ...checkpoint import load_tokenizer, verify
from ...checkpoint.checks import REPORT, existing_folder, read_config, stored_tensors
from ...checkpoint.headers import StoredTensor, read_json
from ...errors import InputError
from ...files import check_output
from ...model import PPFLlamaConfig

LAYER_0 = "Prune again with a policy that leaves layer 0 at least one kv-group: PPF's own policies do"


@dataclass(frozen=True)
class Source:
    """An opened checkpoint, dense or pruned. Weights are read one at a time, when asked for."""

    folder: Path
    config: PreTrainedConfig
    stored: dict[str, StoredTensor]
    report: dict[str, Any]
    """What ``ppf.json`` says; empty for a checkpoint that PPF did not write."""

    @cached_property
    def widths(self) -> list[tuple[int, int, int]]:
        """(query heads, kv heads, FFN channels) of every layer, length L; zeros where a sub-layer is absent."""
        c = self.config
        if isinstance(c, PPFLlamaConfig):
            return c.layer_widths()
        return [(c.num_attention_heads, c.num_key_value_heads, c.intermediate_size)] * c.num_hidden_layers

    @property
    def is_uniform(self) -> bool:
        """True if all layers have the same widths: an ordinary Llama or Mistral."""
        return not isinstance(self.config, PPFLlamaConfig)

    @cached_property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.widths[0][0]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises ``InputError`` if it is missing or damaged."""
        return load_tokenizer(self.folder)

    def tensor(self, name: str) -> Tensor:
        """One weight, in its stored dtype, on the CPU."""
        with safe_open(self.stored[name].file, framework="pt") as reader:
            return reader.get_tensor(name)


def open_source(path: str | Path) -> Source:
    """Check a checkpoint (files, shapes, recorded SHA-256) and open it; raises ``InputError``. Reads no weights yet."""
    folder = existing_folder(path)
    _require_attention_in_layer_0(folder)
    config = read_config(folder)
    stored = stored_tensors(folder, config)
    verify(folder)
    report = read_json(folder / REPORT) if (folder / REPORT).is_file() else {}
    return Source(folder, config, stored, report)


def check_destination(source: Source, output: str | Path, force: bool) -> None:
    """Raise ``InputError`` unless an export may be written to ``output``; replacing its own source is refused."""
    target, origin = Path(output).resolve(), source.folder.resolve()
    if target == origin or target in origin.parents:
        raise InputError("output", output, "holds the checkpoint to export", "Name a new folder")
    check_output(output, force)


def _require_attention_in_layer_0(folder: Path) -> None:
    """Said here and not by the config class, whose message cannot know what to do about it."""
    layers = read_json(folder / "config.json").get("per_layer_config")
    first = {int(index): layer for index, layer in layers.items()}.get(0, {}) if isinstance(layers, dict) else {}
    if isinstance(first, dict) and 0 in (first.get("num_attention_heads"), first.get("num_key_value_heads")):
        problem = "is 0, and every reader takes the cache's geometry from layer 0"
        raise InputError("attention heads of layer 0", folder / "config.json", problem, LAYER_0)
