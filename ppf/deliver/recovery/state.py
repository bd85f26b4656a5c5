"""An unfinished recovery on disk: ``OUT.unfinished`` beside OUT, removed once OUT is complete.

OUT.unfinished/question.json        what is being computed; only the same question may go on with it
OUT.unfinished/state.safetensors    weights being trained, AdamW's moments, steps done, losses: one file, so one moment
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...storage.checksums import checksum
from ...storage.leftovers import is_temporary_of, remove, sweep_inside, temporary_sibling
from ...storage.locks import holds
from ...storage.sealed import Sealed

_QUESTION, _STATE = "question.json", "state.safetensors"
_WEIGHT = "weight."
_REMEDY = "Use the same arguments to resume it, or delete the folder to start anew"


class Unfinished:
    """The folder of an unfinished recovery of ``output``; made by :meth:`begin`."""

    def __init__(self, output: Path, question: dict[str, Any]):
        """Raises ``InputError`` if the folder holds the answer to another question; writes nothing."""
        self.path = _folder_of(output)
        # As it comes back from disk: tuples are lists there.
        self.question = json.loads(json.dumps(question))
        self._question_file = _question_file(self.path)
        owner, remedy = checksum(json.dumps(self.question, sort_keys=True)), f"Delete {self.path} to start anew"
        self._files = Sealed(self.path, owner, "output", remedy)
        if self.path.exists():
            self._require_same()
            if holds(output):
                sweep_inside(self.path)

    @classmethod
    def remove_of(cls, output: Path, question: dict[str, Any]) -> None:
        """Remove the folder if it holds what ``output`` has become, whose ``question`` that is: a kill came between."""
        try:
            theirs = _question_file(_folder_of(output)).read_json(_QUESTION, dict[str, Any])
        except InputError:
            return
        if theirs == json.loads(json.dumps(question)):
            cls(output, question).remove()

    def begin(self) -> None:
        """Make the folder, if it is not there yet."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / _QUESTION).exists():
            self._question_file.write_json(_QUESTION, self.question)

    def load(self, device: torch.device, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor] | None:
        """The last saved state, with tensors of these ``shapes``, or None. Raises ``InputError`` for a damaged file."""
        if not self._files.exists(_STATE):
            return None
        state = self._files.tensors(_STATE, str(device))
        for name in sorted(set(state) | set(shapes)):
            if name not in state or name not in shapes or tuple(state[name].shape) != tuple(shapes[name]):
                raise self._files.damaged(_STATE, f"{name} is not of what is trained")
            if state[name].numel() and not all(bool(end.isfinite()) for end in torch.aminmax(state[name])):
                raise self._files.damaged(_STATE, f"{name} holds numbers that are not finite")
        return state

    def weights(self) -> dict[str, Tensor]:
        """The weights in the saved state, on the CPU, by their names. Raises ``InputError`` for a damaged file."""
        state = self._files.tensors(_STATE)
        return {name.removeprefix(_WEIGHT): state[name] for name in state if name.startswith(_WEIGHT)}

    def save(self, state: dict[str, Tensor]) -> None:
        """Replace the saved state, atomically."""
        self._files.write_safetensors(_STATE, state)

    def remove(self) -> None:
        """Remove the folder, at once: nothing is left of it that looks like half a state."""
        gone = temporary_sibling(self.path)
        try:
            os.rename(self.path, gone)
        finally:  # a signal may come between
            remove(gone)

    def _require_same(self) -> None:
        if self.path.is_dir() and not any(entry.name in (_QUESTION, _STATE) for entry in self.path.iterdir()):
            if any(not is_temporary_of(entry.name, _QUESTION, _STATE) for entry in self.path.iterdir()):
                raise InputError("output", self.path, "is in the way of the unfinished state", "Name another output")
            return  # killed before its first file was complete
        theirs = self._question_file.read_json(_QUESTION, dict[str, Any])
        if theirs != self.question:
            different = next(name for name in self.question if theirs.get(name) != self.question[name])
            raise InputError("output", self.path, f"is an unfinished recovery with another {different}", _REMEDY)


def _question_file(folder: Path) -> Sealed:
    return Sealed(folder, "", "output", f"Move {folder} away, or name another output")


def _folder_of(output: Path) -> Path:
    output = output.resolve()
    return output.with_name(f"{output.name}.unfinished")
