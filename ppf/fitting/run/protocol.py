"""What a perplexity was measured on. A perplexity without it cannot be compared with another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint.hashes import sha256_of
from .directory import Run


@dataclass(frozen=True)
class Protocol:
    """A text file and its SHA-256, which ``part`` of it, and how many ``tokens`` in sequences of which length.

    Tokens are always those of the checkpoint's own tokenizer without special tokens; each sequence is scored on its
    own, from its second token on.
    """

    text: str
    sha256: str
    part: str
    sequence_length: int
    tokens: int

    @classmethod
    def of_file(cls, text: str | Path, sequences: Tensor, part: str) -> Protocol:
        """The protocol of int64 ``sequences`` [N, T], taken from ``text``."""
        return cls(str(Path(text).resolve()), sha256_of(Path(text)), part, sequences.shape[1], sequences.numel())

    @classmethod
    def of_run(cls, run: Run, sequences: Tensor) -> Protocol:
        """The protocol of a run's evaluation ``sequences`` [N, T]."""
        name = "eval_text" if run.manifest["files"]["eval_text"] else "text"
        part = "evaluation split" if name == "eval_text" else "evaluation split (from the last quarter)"
        sha256 = run.manifest["texts"][name]
        return cls(run.manifest["files"][name], sha256, part, sequences.shape[1], sequences.numel())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        size = f"{self.tokens:,} tokens in sequences of {self.sequence_length}"
        return f"{Path(self.text).name}, {self.part}, {size}, sha256 {self.sha256[:12]}"
