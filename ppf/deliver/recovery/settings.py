"""What a recovery training is asked for. Two with equal settings, models and texts give the same result."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import InputError

METHODS = {
    "lora": 2e-3,
    "full": 1e-3,
    "norms": 1e-2,
}
"""Learning rate of every method, where none is given."""

_LORA_RANK = 16


@dataclass(frozen=True)
class RecoverySettings:
    """Settings of ``ppf recover``; all sizes in tokens.

    ``method``: "lora" (low-rank updates of all linear layers, merged at the end), "full" (every weight) or "norms"
    (norm weights and biases, arXiv 2312.15230). ``distillation`` is the share of the dense model's distribution in
    the loss, the rest is the text itself. ``micro_tokens`` go through the model at once (None: as many as should fit);
    ``batch_tokens`` make one step. ``rank`` is LoRA's. Raises ``InputError`` for values without sense.
    """

    method: str = "lora"
    tokens: int = 5_000_000
    learning_rate: float | None = None
    distillation: float = 1.0
    sequence_length: int = 512
    batch_tokens: int = 8_192
    micro_tokens: int | None = None
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError("method", self.method, "is unknown", f"Use one of {list(METHODS)}")
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", METHODS[self.method])
        self._check_rank()
        _check_share("distillation", self.distillation)
        if not _is_number(self.learning_rate) or not 0 < self.learning_rate < math.inf:
            raise InputError("learning-rate", self.learning_rate, "trains nothing", "Use a small positive number")
        self._check_sizes()

    def _check_rank(self) -> None:
        if self.method == "lora":
            if self.rank is None:
                object.__setattr__(self, "rank", _LORA_RANK)
            _check_whole("rank", self.rank, 1, "LoRA needs a rank")
        elif self.rank is not None:
            raise InputError("rank", self.rank, f"makes no sense with method {self.method}", "Drop it, or use lora")

    def _check_sizes(self) -> None:
        length = self.sequence_length
        _check_whole("sequence-length", length, 2, "a shorter sequence predicts no token")
        _check_whole("seed", self.seed, 0, "seeds are not negative")
        sizes = {"tokens": self.tokens, "batch-tokens": self.batch_tokens, "micro-tokens": self.micro_tokens}
        for name, value in sizes.items():
            if value is not None:
                _check_whole(name, value, length, f"is less than one sequence of {length} tokens")

    @property
    def batch(self) -> int:
        """Sequences a step."""
        return min(self.batch_tokens, self.tokens) // self.sequence_length

    @property
    def steps(self) -> int:
        """Steps that see at least ``tokens`` tokens."""
        return math.ceil(self.tokens / (self.batch * self.sequence_length))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ElasticSettings(RecoverySettings):
    """Settings of ``ppf recover --elastic``: each step trains ``policies`` of the agent's, those that remove the shares
    ``smallest`` and ``largest`` of the decoder's parameters and others between."""

    method: str = "full"
    smallest: float = 0.1
    largest: float = 0.5
    policies: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("smallest", "largest"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise InputError(f"{name}-ratio", value, "is not a share of the parameters", "Use one from 0 to 1")
        if self.smallest >= self.largest:
            remedy = f"Use less than --largest-ratio {self.largest}"
            raise InputError("smallest-ratio", self.smallest, "leaves no sizes to train", remedy)
        _check_whole("policies", self.policies, 2, "a step trains the largest and the smallest model at least")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_share(field: str, value: Any) -> None:
    if not _is_number(value) or not 0 <= value <= 1:
        raise InputError(field, value, "is not a share", "Use a number from 0 (off) to 1")


def _check_whole(field: str, value: Any, least: int, problem: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(field, value, problem, f"Use a whole number, at least {least}")
