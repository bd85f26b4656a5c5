"""Profiles: how many milliseconds a sub-layer of every width takes on a device; measured by ``ppf profile``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ...families import KINDS
from ...fast.timing import Workload
from ...files import write_json
from ...model.grid import Grid
from ...model.structure import Structure
from .base import Fitted
from .costs import Costs

PROFILE = "profile.json"
"""The file of a run's profiles."""


@dataclass(frozen=True)
class Profile:
    """Milliseconds of a workload: ``constant`` plus, of every layer, ``attention[level]`` and ``ffn[level]``."""

    workload: Workload
    constant: float
    attention: tuple[float, ...]
    ffn: tuple[float, ...]

    def costs(self, grid: Grid) -> Costs:
        """The cost table of timed budgets: what was measured, made monotone."""
        table = torch.zeros(grid.sublayers, grid.levels, dtype=torch.float64)
        layers = grid.structure.layers
        for rows, values in ((table[:layers], self.attention), (table[layers:], self.ffn)):
            monotone = torch.tensor(values, dtype=torch.float64).cummax(0).values.clamp_min(0)
            rows[:, : len(values)], rows[:, len(values) :] = monotone, monotone[-1]
        what = "prompt pass" if self.workload.phase == "prefill" else "decode step"
        return Costs(table, self.constant, f"milliseconds a {what}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Profile:
        """Inverse of :meth:`to_dict`; raises ``KeyError`` or ``TypeError`` for anything else."""
        values = (tuple(float(v) for v in data[name]) for name in KINDS)
        return cls(Workload(**data["workload"]), float(data["constant"]), *values)


def require_equal_layers(structure: Structure, field: str, value: Any) -> None:
    """Raise ``InputError`` about ``field`` unless all layers have the same units: a profile has one list a kind."""
    if any(len(set(structure.of(kind))) > 1 for kind in KINDS):
        problem = "layers of this model differ; latency budgets need equal layers"
        raise InputError(field, value, problem, "Ask with --ratio, --memory-gb or --flops")


def save_profile(path: Path, facts: dict[str, Any], profiles: list[Profile]) -> None:
    """Write profiles of one device, one a phase, with the facts about where they were measured."""
    write_json(path, facts | {"profiles": {p.workload.phase: p.to_dict() for p in profiles}})


def load_profile(run: Fitted, phase: str, kind: str) -> Profile:
    """The run's profile of "prefill" or "decode". Raises ``InputError`` about ``kind`` if there is none."""
    grid, remedy = run.grid, f"Measure one first: ppf profile {run.path}"
    require_equal_layers(grid.structure, kind, run.path)
    try:
        data = json.loads((run.path / PROFILE).read_text(encoding="utf-8"))
        profile = Profile.from_dict(data["profiles"][phase])
    except FileNotFoundError:
        raise InputError(kind, run.path, "has no latency profile", remedy) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"its {PROFILE} has no readable {phase} profile ({type(error).__name__})"
        raise InputError(kind, run.path, problem, remedy) from None
    if (len(profile.attention), len(profile.ffn)) != (grid.maximum[0] + 1, grid.maximum[-1] + 1):
        raise InputError(kind, run.path, "its profile is of another grid", remedy)
    return profile
