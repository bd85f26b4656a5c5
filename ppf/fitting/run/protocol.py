"""What a perplexity was measured on. A perplexity without it cannot be compared with another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint.checks import read_config
from ...checkpoint.hashes import sha256_of
from ...families import family_of
from .directory import Run


@dataclass(frozen=True)
class Protocol:
    """A text file and its SHA-256, which ``part`` of it, and how many ``tokens`` in sequences of which length.

    Tokens are always those of the checkpoint's own tokenizer without special tokens, but every sequence has the id
    ``begin`` in front unless that is None. Each is scored on its own, from its second token on.
    """

    text: str
    sha256: str
    part: str
    sequence_length: int
    tokens: int
    begin: int | None = None

    @classmethod
    def of_file(cls, text: str | Path, sequences: Tensor, part: str, begin: int | None = None) -> Protocol:
        """The protocol of int64 ``sequences`` [N, T], taken from ``text``, that begin with the id ``begin`` if any."""
        sha256, (_, length) = sha256_of(Path(text)), sequences.shape
        return cls(str(Path(text).resolve()), sha256, part, length, sequences.numel(), begin)

    @classmethod
    def of_run(cls, run: Run, sequences: Tensor) -> Protocol:
        """The protocol of a run's evaluation ``sequences`` [N, T]."""
        name = "eval_text" if run.manifest["files"]["eval_text"] else "text"
        part = "evaluation split" if name == "eval_text" else "evaluation split (from the last quarter)"
        sha256, (_, length) = run.manifest["texts"][name], sequences.shape
        begins = family_of(read_config(run.model_path).model_type).begins
        begin = int(sequences[0, 0]) if begins else None
        return cls(run.manifest["files"][name], sha256, part, length, sequences.numel(), begin)

    @property
    def beginning(self) -> str:
        """What is to be said of sequences with a begin token."""
        return "" if self.begin is None else f", each behind the begin token ({self.begin})"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        size = f"{self.tokens:,} tokens in sequences of {self.sequence_length}{self.beginning}"
        return f"{Path(self.text).name}, {self.part}, {size}, sha256 {self.sha256[:12]}"
