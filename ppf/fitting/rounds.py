"""The fit loop's journal: how far the predictor was off at the agent's own policies, round by round.

RUN/rounds.json is written whole after every round, so that a killed fit finds what it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import msgspec
import torch

from ..choose.predictor import Prediction
from ..storage.schemas import Count, Nonnegative
from ..storage.sealed import Sealed

ROUNDS = "rounds.json"

_IN_A_ROW = 2
# A median error of so many standard uncertainties, where 0.67 are expected, says that these are not what they claim.
_ASTRAY = 4.0


@dataclass(frozen=True)
class Round:
    """One round: its number, how many of its ``policies`` the agent gave, and two medians over those, in nats: ``gap``
    between predicted and measured log-perplexity, and ``expected``, the predictor's own standard uncertainty."""

    index: Count
    policies: Count
    gap: Nonnegative
    expected: Nonnegative

    @classmethod
    def of(cls, index: int, prediction: Prediction, measured: Sequence[float]) -> Round:
        """The agent's policies of a round, as predicted before it and as ``measured`` [P] in it; P ≥ 1."""
        gap = (prediction.mean.cpu() - torch.tensor(measured)).abs().median()
        return cls(index, len(measured), float(gap), float(prediction.std.median()))


class _Rounds(msgspec.Struct):
    rounds: list[Round]


class Journal:
    """The rounds so far, kept among the ``files`` of a run, or in memory only if that is None."""

    def __init__(self, files: Sealed | None = None):
        """Raises ``InputError`` for a damaged file."""
        self._files = files
        self.rounds: dict[int, Round] = {}
        if files is not None and files.exists(ROUNDS):
            self.rounds = {row.index: row for row in files.read_json(ROUNDS, _Rounds).rounds}

    def add(self, round_: Round) -> None:
        """Write one more round."""
        self.rounds[round_.index] = round_
        if self._files is not None:
            self._files.write_json(ROUNDS, {"rounds": [asdict(self.rounds[index]) for index in sorted(self.rounds)]})

    @property
    def knows(self) -> bool:
        """Whether the predictor's uncertainty at the agent's own policies was ever put to the test, and was about right
        in the last round. These were chosen for what is predicted of them: of their errors random ones say nothing."""
        if not self.rounds:
            return False
        last = self.rounds[max(self.rounds)]
        return last.gap <= _ASTRAY * last.expected

    def settled(self, index: int) -> bool:
        """True if in round ``index`` and the one before the predictor was no further off than it expected to be."""
        last = [self.rounds.get(number) for number in range(index - _IN_A_ROW + 1, index + 1)]
        return all(found is not None and found.gap <= found.expected for found in last)
