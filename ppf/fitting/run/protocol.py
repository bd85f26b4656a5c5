"""What a perplexity was measured on. A perplexity without it cannot be compared with another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint.checks import read_config
from ...families import family_of
from ..reader import Reading
from .directory import Run


@dataclass(frozen=True)
class Protocol:
    """A text and its SHA-256, which ``part`` of it, and how many ``tokens`` in sequences of which length. ``read_as``
    says how anything but plain text became tokens: its format, field and split, the documents and how they were joined.

    Tokens are always those of the checkpoint's own tokenizer without special tokens, but every sequence has the id
    ``begin`` in front unless that is None. Each is scored on its own, from its second token on.
    """

    text: str
    sha256: str
    part: str
    sequence_length: int
    tokens: int
    begin: int | None = None
    read_as: dict[str, Any] | None = None

    @classmethod
    def of_reading(cls, reading: Reading, sequences: Tensor, part: str) -> Protocol:
        """The protocol of ``sequences`` [N, T] taken from those of ``reading``."""
        count, length = sequences.numel(), sequences.shape[1]
        return cls(reading.name, reading.sha256, part, length, count, reading.begin, reading.read_as)

    @classmethod
    def of_run(cls, run: Run, sequences: Tensor) -> Protocol:
        """The protocol of a run's evaluation ``sequences`` [N, T]; of own answers, ``tokens`` are those of these."""
        if (scored := run.scored()) is not None:
            return cls._of_answers(run, sequences, int(scored.sum()))
        name = "eval_text" if run.manifest["files"]["eval_text"] else "text"
        part = "evaluation split" if name == "eval_text" else "evaluation split (from the last quarter)"
        sha256, (_, length) = run.manifest["texts"][name], sequences.shape
        begin = _begin(run, sequences)
        read_as = run.manifest.get("read_as", {}).get(name)
        return cls(run.manifest["files"][name], sha256, part, length, sequences.numel(), begin, read_as)

    @classmethod
    def _of_answers(cls, run: Run, sequences: Tensor, tokens: int) -> Protocol:
        answers = run.manifest["own_answers"]
        told = {name: answers[name] for name in ("read_as", "most_tokens", "temperature", "seed")}
        told |= {"answers": answers["evaluation"]["answers"]} | run.manifest["texts"]["own_answers"].get("form", {})
        part = "the dense model's own answers to the last of its prompts, only the answers' tokens"
        begin, length = _begin(run, sequences), sequences.shape[1]
        return cls(answers["prompts"], answers["sha256"], part, length, tokens, begin, {"own_answers": told})

    @property
    def beginning(self) -> str:
        """What is to be said of sequences with a begin token."""
        return "" if self.begin is None else f", each behind the begin token ({self.begin})"

    def to_dict(self) -> dict[str, Any]:
        """Without "read_as" for plain text."""
        return {name: value for name, value in asdict(self).items() if name != "read_as" or value is not None}

    def __str__(self) -> str:
        size = f"{self.tokens:,} tokens in sequences of {self.sequence_length}{self.beginning}"
        return f"{Path(self.text).name}, {self.part}, {size}, sha256 {self.sha256[:12]}"


def _begin(run: Run, sequences: Tensor) -> int | None:
    """The id in front of every sequence, if the family of the run's model has one there."""
    return int(sequences[0, 0]) if family_of(read_config(run.model_path).model_type).begins else None
