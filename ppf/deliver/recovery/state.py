"""An unfinished recovery on disk: ``OUT.unfinished`` beside OUT, removed once OUT is complete.

OUT.unfinished/question.json        what is being computed; only the same question may go on with it
OUT.unfinished/state.safetensors    weights being trained, AdamW's moments, steps done, losses: one file, so one moment
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ...errors import InputError
from ...files import write_json, write_safetensors

_QUESTION, _STATE = "question.json", "state.safetensors"
_WEIGHT = "weight."
_REMEDY = "Use the same arguments to resume it, or delete the folder to start anew"


class Unfinished:
    """The folder of an unfinished recovery of ``output``; made by :meth:`begin`."""

    def __init__(self, output: Path, question: dict[str, Any]):
        """Raises ``InputError`` if the folder holds the answer to another question; writes nothing."""
        output = output.resolve()
        self.path = output.with_name(f"{output.name}.unfinished")
        # As it comes back from disk: tuples are lists there.
        self._question = json.loads(json.dumps(question))
        if self.path.exists():
            self._require_same()

    def begin(self) -> None:
        """Make the folder, if it is not there yet."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / _QUESTION).exists():
            write_json(self.path / _QUESTION, self._question)

    def load(self, device: torch.device) -> dict[str, Tensor] | None:
        """The last saved state, or None. Raises ``InputError`` for a damaged file."""
        file = self.path / _STATE
        if not file.exists():
            return None
        try:
            return load_file(file, device=str(device))
        except (OSError, SafetensorError) as error:
            problem = f"cannot be read ({' '.join(str(error).split())[:200]})"
            raise InputError("output", file, problem, "Delete the folder to start anew") from None

    def weights(self) -> dict[str, Tensor]:
        """The weights in the saved state, on the CPU, by their names."""
        with safe_open(self.path / _STATE, framework="pt") as saved:
            names = [name for name in saved.keys() if name.startswith(_WEIGHT)]  # noqa: SIM118  (no mapping)
            return {name.removeprefix(_WEIGHT): saved.get_tensor(name) for name in names}

    def save(self, state: dict[str, Tensor]) -> None:
        """Replace the saved state, atomically."""
        write_safetensors(self.path / _STATE, state)

    def remove(self) -> None:
        shutil.rmtree(self.path)

    def _require_same(self) -> None:
        file = self.path / _QUESTION
        if self.path.is_dir() and not any(entry.name in (_QUESTION, _STATE) for entry in self.path.iterdir()):
            if any(not entry.name.endswith(".tmp") for entry in self.path.iterdir()):
                raise InputError("output", self.path, "is in the way of the unfinished state", "Name another output")
            return  # killed before its first file was complete
        try:
            theirs = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            problem = f"is not an unfinished recovery ({' '.join(str(error).split())[:200]})"
            raise InputError("output", self.path, problem, "Move it away, or name another output") from None
        if theirs != self._question:
            different = next(name for name in self._question if theirs.get(name) != self._question[name])
            raise InputError("output", self.path, f"is an unfinished recovery with another {different}", _REMEDY)
