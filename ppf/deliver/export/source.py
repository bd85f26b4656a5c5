"""What an export starts from: a verified checkpoint, its family and the widths of its layers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ...checkpoint import Checkpoint, load_generation_config, load_tokenizer, local_folder, verify
from ...checkpoint.hashes import hash_folder
from ...checkpoint.headers import StoredTensor, read_json
from ...checkpoint.report import standing_report
from ...errors import InputError, shown
from ...families import ATTENTION, Family
from ...families.traits import traits_of
from ...model.geometry import head_dim_of, structure_of
from ...model.structure import Structure
from ...storage.files import check_output
from ..standing import report_of

LAYER_0 = "Prune again with a policy that leaves layer 0 at least one kv-group: PPF's own policies do"


@dataclass(frozen=True)
class Source:
    """An opened checkpoint, dense or pruned; of a multimodal model, its text tower. Weights are read one at a time."""

    checkpoint: Checkpoint
    report: dict[str, Any]
    """What ``ppf.json`` says that still holds; empty for a checkpoint that PPF did not write."""

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def config(self) -> PreTrainedConfig:
        return self.checkpoint.config

    @property
    def family(self) -> Family:
        return self.checkpoint.family

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        """The language model's tensors, by the names of a text-only model."""
        return self.checkpoint.stored

    @property
    def is_tower(self) -> bool:
        """True if the folder holds a multimodal model around the language model."""
        return self.checkpoint.wrapper is not None

    @cached_property
    def traits(self) -> frozenset[str]:
        """What the model's arithmetic has beyond a plain Llama's."""
        return traits_of(self.family, self.config)

    @cached_property
    def widths(self) -> list[tuple[int, int, int]]:
        """(query heads, kv heads, FFN channels) of every layer, length L; zeros where a sub-layer is absent."""
        layers = []
        for index in range(self.config.num_hidden_layers):
            widths = self.family.widths(self.config.per_layer_config[index])
            groups, heads = widths["attention"]
            layers.append((groups * heads, groups, widths["ffn"][0]))
        return layers

    @property
    def is_uniform(self) -> bool:
        """True if all layers have the same widths: an ordinary model of its family."""
        return self.config.model_type != self.family.result_type

    @cached_property
    def head_dim(self) -> int:
        return head_dim_of(self.config)

    @cached_property
    def biases(self) -> frozenset[str]:
        """What has a bias in any layer: roles of rows ("query"), "attention output", "ffn output"."""
        found = {name.split(".", 3)[-1].removesuffix(".bias") for name in self.stored if name.endswith(".bias")}
        roles: set[str] = set()
        for kind, part in self.family.parts.items():
            for name, of_name in part.rows.items():
                roles.update(of_name if f"{part.module}.{name}" in found else ())
            if part.output_name in found:
                roles.add(f"{kind} output")
        return frozenset(roles)

    @cached_property
    def contents(self) -> str:
        """SHA-256 of all files but the report."""
        return hashlib.sha256(json.dumps(hash_folder(self.folder)).encode()).hexdigest()

    @cached_property
    def structure(self) -> Structure:
        return structure_of(self.family, self.config)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises ``InputError`` if it is missing or damaged."""
        return load_tokenizer(self.folder)

    @cached_property
    def ends(self) -> list[int]:
        """Tokens at which generation stops."""
        said = load_generation_config(self.folder)
        found = None if said is None else said.eos_token_id
        found = self.config.eos_token_id if found is None else found
        return found if isinstance(found, list) else [] if found is None else [found]

    def tensor(self, name: str) -> Tensor:
        """One weight, in its stored dtype, on the CPU."""
        return self.checkpoint.tensor(name)


def open_source(path: str | Path) -> Source:
    """Check a checkpoint (files, shapes, recorded SHA-256) and open it; raises ``InputError``. Reads no weights yet."""
    folder = local_folder(path)
    _require_attention_in_layer_0(folder)
    checkpoint = Checkpoint(folder)
    verify(folder)
    report = standing_report(folder)
    if report:
        require_inside(folder, folder.iterdir())
    return Source(checkpoint, report)


def require_inside(folder: Path, files: Iterable[Path]) -> None:
    """Raise ``InputError`` for the first of ``files``, those of ``folder``, that is a link out of it: what an export
    gives away is what the folder holds. In the cache of a hub all files are links into the repository's blobs."""
    own = folder.resolve()
    places = (own, own.parents[1] / "blobs") if own.parent.name == "snapshots" else (own,)
    for file in sorted(files):
        if file.is_symlink() and not any(place in file.resolve().parents for place in places):
            problem = f"is a link to {shown(os.readlink(file))}, which an export does not follow"
            raise InputError("file", file, problem, "Put the file itself there, or remove the link")


def check_destination(source: Source, output: str | Path, force: bool) -> None:
    """Raise ``InputError`` unless an export may be written to ``output``; replacing its own source is refused. One that
    holds an export is looked at when it is known what would be written: see :func:`ppf.deliver.export.hf.stands`."""
    target, origin = Path(output).resolve(), source.folder.resolve()
    if target == origin or target in origin.parents:
        raise InputError("output", output, "holds the checkpoint to export", "Name a new folder")
    if force or "export" not in (report_of(output) or {}):
        check_output(output, force)


def _require_attention_in_layer_0(folder: Path) -> None:
    """Said here and not by the config class, whose message cannot know what to do about it."""
    layers = read_json(folder / "config.json").get("per_layer_config")
    first = {int(index): layer for index, layer in layers.items()}.get(0, {}) if isinstance(layers, dict) else {}
    if isinstance(first, dict) and 0 in (first.get(field) for field in ATTENTION.widths):
        problem = "is 0, and every reader takes the cache's geometry from layer 0"
        raise InputError("attention heads of layer 0", folder / "config.json", problem, LAYER_0)
