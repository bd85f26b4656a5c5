"""The texts of a fit: what identifies them, what is said of them, and the sequences that are taken from them.

With the model's own answers these calibrate, and a text judges: its last quarter, as if it calibrated, too, so that two
such fits can be compared; or the text that is there for that; or else the answers to the last of the prompts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.hashes import sha256_of
from ..errors import InputError
from ..text import Splits, Text, split, take_tokens
from .own_answers import Answers
from .reader import Reader, Reading
from .run.settings import Settings

# Of one text, the share that calibration may use; the rest is for evaluation.
_SHARE = 0.75


class Texts:
    """A ``text``, and an ``eval_text`` or None, read with the tokenizer of the checkpoint ``model`` when first needed;
    or its own ``answers``, with one of the two or none.

    A file is known by its hash, which a resumed fit can check without reading it as tokens. Pipes, datasets on the hub
    and Python's objects are known once they are read. Raises ``InputError`` if nothing calibrates, and for a text that
    would not be used.
    """

    def __init__(
        self, model: str | Path, text: Any, eval_text: Any, settings: Settings, answers: Answers | None = None
    ):
        self._model, self._settings, self._answers = model, settings, answers
        given = {"text": text, "eval_text": eval_text}
        self._texts = {name: None if text is None else Text.of(text) for name, text in given.items()}
        if answers is None and text is None:
            raise InputError("text", None, "is missing", "Give a text, or prompts with --own-answers")
        if answers is not None and text is not None and eval_text is not None:
            problem = "is used for nothing: own answers calibrate, and another text evaluates"
            raise self._texts["text"].refuse("text", problem, "Drop it, or --eval-text")

    def identity(self) -> dict[str, Any]:
        """Equal for equal texts, read alike. Raises ``InputError`` for a text that cannot be read."""
        forms = {name: text.form for name, text in self._texts.items() if text is not None and text.form}
        own = {} if self._answers is None else {"own_answers": self._answers.identity(self._answers_judge)}
        return {name: self._sha256(name) for name in self._texts} | ({"forms": forms} if forms else {}) | own

    @property
    def facts(self) -> dict[str, Any]:
        """For a run's manifest: "files", the texts' names, how those were read that are no plain text, and how prompts
        were answered."""
        names = {name: reading and reading.name for name, reading in self._readings.items()}
        read_as = {name: reading.read_as for name, reading in self._readings.items() if reading and reading.read_as}
        own = {} if self._answers is None else {"own_answers": self._answers.facts}
        return {"files": names} | ({"read_as": read_as} if read_as else {}) | own

    def splits(self) -> Splits:
        """Sequences for calibration and for evaluation. Raises ``InputError`` for texts that are too short, and for
        prompts that cannot be answered."""
        judges = None if self._answers_judge else self._evaluation()  # what is wrong with it is said first
        if self._answers is None:
            return judges
        own = self._answers.splits(self._answers_judge)
        return own if judges is None else replace(own, evaluation=judges.evaluation)

    @property
    def _answers_judge(self) -> bool:
        """Whether evaluation is on own answers, too."""
        return self._answers is not None and not any(self._texts.values())

    def _evaluation(self) -> Splits:
        """The parts of the texts; without ``text``, nothing to calibrate on."""
        text, evaluation = self._readings["text"], self._readings["eval_text"]
        calibration_tokens, evaluation_tokens = self._settings.calibration_tokens, self._settings.evaluation_tokens
        if evaluation is None:
            return split(text.sequences, calibration_tokens, evaluation_tokens, _SHARE)
        judges = take_tokens(evaluation.sequences, evaluation_tokens)
        return Splits(judges[:0] if text is None else take_tokens(text.sequences, calibration_tokens), judges)

    @cached_property
    def _readings(self) -> dict[str, Reading | None]:
        if self._answers_judge:
            return dict.fromkeys(self._texts)
        reader = Reader.of(self._model, self._settings.sequence_length)
        calibration, evaluation = self._needed()
        text, eval_text = self._texts["text"], self._texts["eval_text"]
        if eval_text is None:
            # So many that both parts are as long as asked for.
            most = max(math.ceil(calibration / _SHARE), math.ceil(evaluation / (1 - _SHARE))) + 1
            return {"text": reader.read(text, most=most), "eval_text": None}
        return {
            "text": None if text is None else reader.read(text, most=calibration),
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
