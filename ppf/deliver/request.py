"""Requests: from one of the ways to ask for a size to a budget of a run."""

from __future__ import annotations

from dataclasses import dataclass

from ..choose.budget import BUDGETS, Budget
from ..errors import InputError
from ..fitting.run import Run


@dataclass(frozen=True)
class Request:
    """What a user can ask for; exactly one of the fields but ``context`` must be given.

    ``ratio``: share of decoder parameters to remove. ``memory_gb``: 10⁹ bytes of all weights in the checkpoint's dtype.
    ``flops``: operations a token that attends to ``context`` others. ``latency_ms``: the prompt pass of the run's
    profile. ``tokens_per_second``: of all sequences together in its decode step.
    """

    ratio: float | None = None
    memory_gb: float | None = None
    flops: float | None = None
    latency_ms: float | None = None
    tokens_per_second: float | None = None
    context: int = 2048

    @property
    def given(self) -> dict[str, float]:
        """Name, as the command line writes it, and value of what is given."""
        values = {kind.name: getattr(self, kind.name.replace("-", "_")) for kind in BUDGETS}
        return {name: value for name, value in values.items() if value is not None}

    def budget(self, run: Run) -> Budget:
        """The budget on ``run``. Raises ``InputError`` unless exactly one thing is asked for and can be had."""
        given = self.given
        if len(given) != 1:
            names = ", ".join(f"--{kind.name}" for kind in BUDGETS)
            field, value, problem = "budget", ", ".join(given), "are given together"
            if not given:
                field, value, problem = BUDGETS[0].name, "(none)", "is missing"
            raise InputError(field, value, problem, f"Give exactly one of {names}")
        asked = next(kind for kind in BUDGETS if kind.name in given)
        return asked.of(run, given[asked.name], self.context)
