"""Multimodal models around a text tower that PPF can prune: which tensors are the tower's, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..families import tower_of
from ..model.build import TIED
from ..model.tower import PREFIX, tower_type
from .headers import StoredTensor

_MODEL = "model."


@dataclass(frozen=True)
class Wrapper:
    """A multimodal model on disk. ``prefix`` stands in front of the tower's tensors in place of "model.", ``head`` in
    front of the language model's head."""

    model_type: str
    """transformers' own, also for wrappers around our results."""
    data: Mapping[str, Any]
    """Its config.json."""
    prefix: str
    head: str

    @property
    def text(self) -> dict[str, Any]:
        """The tower's configuration as a text-only model has it."""
        # transformers goes by the wrapper's field when it ties the head.
        tied = self.data.get("tie_word_embeddings", True)
        stated = {"model_type": None} | self.data["text_config"]
        model_type = stated["model_type"] or tower_type(self.model_type)
        return stated | {"model_type": model_type, "tie_word_embeddings": tied}

    def inside(self, name: str) -> str | None:
        """What the text-only model calls a tensor on disk; None if it is not the tower's."""
        if name == f"{self.head}{TIED[0]}":
            return TIED[0]
        return f"{_MODEL}{name.removeprefix(self.prefix)}" if name.startswith(self.prefix) else None

    def outside(self, name: str) -> str:
        """Inverse of :meth:`inside`."""
        return f"{self.head}{name}" if name == TIED[0] else f"{self.prefix}{name.removeprefix(_MODEL)}"


def wrapper_of(file: Path, data: Mapping[str, Any], found: Mapping[str, StoredTensor]) -> Wrapper | None:
    """The wrapper that config.json ``data`` in ``file`` describes, None for a language model.

    Raises ``InputError`` if the text tower is not there.
    """
    model_type = data.get("model_type")
    stock = model_type.removeprefix(PREFIX) if isinstance(model_type, str) else model_type
    tower = tower_of(stock)
    if tower is None:
        return None
    complete = "Name a complete model of this type"
    text = data.get("text_config")
    if not isinstance(text, dict):
        raise InputError("text_config", text, f"{file} has no configuration of its text tower", complete)
    declared = tower[1]
    # Older layouts, which save_pretrained() still writes, put the whole language model under a name of its own.
    own = declared.removeprefix(_MODEL)
    prefix = next((p for p in (declared, f"{own}{_MODEL}") if f"{p}{TIED[1].removeprefix(_MODEL)}" in found), None)
    if prefix is None:
        problem = f"has no tensor {declared}{TIED[1].removeprefix(_MODEL)}"
        raise InputError("checkpoint", file.parent, problem, complete)
    head = own if f"{own}{TIED[0]}" in found else ""
    return Wrapper(stock, data, prefix, head)
