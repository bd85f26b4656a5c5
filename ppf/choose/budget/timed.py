"""Budgets that are timed, on one device, by a run's profile; the result itself is timed in the end."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from ...fast.timing import milliseconds, runner_of
from ...model.grid import Grid
from .base import TOLERANCE, Fitted, LimitBudget
from .profile import Profile, load_profile


class _TimedBudget(LimitBudget):
    """A limit on the milliseconds of a profile's workload."""

    phase: str
    timed = True
    quantum = 2.0**-20  # about a nanosecond

    def __init__(self, grid: Grid, requested: float, profile: Profile, milliseconds: float):
        self.profile = profile
        super().__init__(grid, requested, profile.costs(grid), milliseconds)

    @classmethod
    def of(cls, run: Fitted, requested: float, context: int) -> _TimedBudget:
        return cls(run.grid, requested, load_profile(run, cls.phase, cls.name))

    def is_met(self, value: float) -> bool:
        """A timing is a measurement: give or take the tolerance."""
        return self.allows(value * (1 + TOLERANCE) if self.upwards else value / (1 + TOLERANCE))

    def delivered(self, model: PreTrainedModel) -> float:
        return self.in_unit(milliseconds(model, self.profile.workload))

    def circumstances(self, model: PreTrainedModel) -> dict[str, Any]:
        return {"workload": asdict(self.profile.workload)} | runner_of(model)


class LatencyBudget(_TimedBudget):
    """Milliseconds of the prompt pass of the run's profile."""

    name, unit, phase = "latency-ms", "milliseconds a prompt pass", "prefill"

    def __init__(self, grid: Grid, milliseconds: float, profile: Profile):
        super().__init__(grid, milliseconds, profile, milliseconds)


class ThroughputBudget(_TimedBudget):
    """Tokens a second, of all sequences together, in the decode step of the run's profile: at least so many."""

    name, unit, phase = "tokens-per-second", "generated tokens a second", "decode"
    upwards = True

    def __init__(self, grid: Grid, tokens_per_second: float, profile: Profile):
        a_token = 1e3 / tokens_per_second if tokens_per_second > 0 else math.nan
        super().__init__(grid, tokens_per_second, profile, a_token * profile.workload.batch)

    def in_unit(self, cost: float) -> float:
        return 1e3 * self.profile.workload.batch / cost if cost else math.inf
