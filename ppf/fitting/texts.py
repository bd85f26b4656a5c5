"""The texts of a fit: what identifies them, what is said of them, and the sequences that are taken from them."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.hashes import sha256_of
from ..text import Splits, Text, split, take_tokens
from .reader import Reader, Reading
from .run.settings import Settings

# Of one text, the share that calibration may use; the rest is for evaluation.
_SHARE = 0.75


class Texts:
    """A ``text``, and an ``eval_text`` or None, read with the tokenizer of the checkpoint ``model`` when first needed.

    A file is known by its hash, which a resumed fit can check without reading it as tokens. Pipes, datasets on the hub
    and Python's objects are known once they are read.
    """

    def __init__(self, model: str | Path, text: Any, eval_text: Any, settings: Settings):
        self._model, self._settings = model, settings
        self._texts = {"text": Text.of(text), "eval_text": None if eval_text is None else Text.of(eval_text)}

    def identity(self) -> dict[str, Any]:
        """Equal for equal texts, read alike. Raises ``InputError`` for a text that cannot be read."""
        forms = {name: text.form for name, text in self._texts.items() if text is not None and text.form}
        return {name: self._sha256(name) for name in self._texts} | ({"forms": forms} if forms else {})

    @property
    def facts(self) -> dict[str, Any]:
        """For a run's manifest: "files", the texts' names, and how those were read that are no plain text."""
        names = {name: reading and reading.name for name, reading in self._readings.items()}
        read_as = {name: reading.read_as for name, reading in self._readings.items() if reading and reading.read_as}
        return {"files": names} | ({"read_as": read_as} if read_as else {})

    def splits(self) -> Splits:
        """Sequences for calibration and for evaluation. Raises ``InputError`` for texts that are too short."""
        text, evaluation = self._readings["text"].sequences, self._readings["eval_text"]
        calibration_tokens, evaluation_tokens = self._settings.calibration_tokens, self._settings.evaluation_tokens
        if evaluation is None:
            return split(text, calibration_tokens, evaluation_tokens, _SHARE)
        return Splits(take_tokens(text, calibration_tokens), take_tokens(evaluation.sequences, evaluation_tokens))

    @cached_property
    def _readings(self) -> dict[str, Reading | None]:
        reader = Reader.of(self._model, self._settings.sequence_length)
        calibration, evaluation = self._needed()
        text, eval_text = self._texts["text"], self._texts["eval_text"]
        if eval_text is None:
            # So many that both parts are as long as asked for.
            most = max(math.ceil(calibration / _SHARE), math.ceil(evaluation / (1 - _SHARE))) + 1
            return {"text": reader.read(text, most=most), "eval_text": None}
        return {
            "text": reader.read(text, most=calibration),
            "eval_text": reader.read(eval_text, "eval-text", evaluation),
        }

    def _needed(self) -> tuple[int, int]:
        """Sequences of calibration and of evaluation."""
        settings = self._settings
        return (
            math.ceil(settings.calibration_tokens / settings.sequence_length),
            math.ceil(settings.evaluation_tokens / settings.sequence_length),
        )

    def _sha256(self, name: str) -> str | None:
        text = self._texts[name]
        if text is None:
            return None
        return sha256_of(text.path) if text.is_file else self._readings[name].sha256
