"""Profiles: how many milliseconds a sub-layer of every width takes on a device; measured by ``ppf profile``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import torch

from ...errors import InputError
from ...families import KINDS
from ...fast.timing import Workload
from ...model.grid import Grid
from ...model.structure import Structure
from ...storage.schemas import Finite, Nonnegative, convert_to
from ...storage.sealed import Sealed
from .base import Fitted
from .costs import Costs

PROFILE = "profile.json"
"""The file of a run's profiles."""


@dataclass(frozen=True)
class Profile:
    """Milliseconds of a workload: ``constant`` plus, of every layer, ``attention[level]`` and ``ffn[level]``."""

    workload: Workload
    constant: Nonnegative
    attention: tuple[Finite, ...]
    ffn: tuple[Finite, ...]

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
        """Inverse of :meth:`to_dict`. Raises ``InputError`` for anything else."""
        return convert_to(cls, "profile", "(data)", data, "Measure one with ppf profile")


class _Profiles(msgspec.Struct):
    """What the file holds, beside facts that nobody computes with."""

    profiles: dict[str, Profile]


def require_equal_layers(structure: Structure, field: str, value: Any) -> None:
    """Raise ``InputError`` about ``field`` unless all layers have the same units: a profile has one list a kind."""
    if any(len(set(structure.of(kind))) > 1 for kind in KINDS):
        problem = "layers of this model differ; latency budgets need equal layers"
        raise InputError(field, value, problem, "Ask with --ratio, --memory-gb or --flops")


def save_profile(files: Sealed, facts: dict[str, Any], profiles: list[Profile], name: str = PROFILE) -> None:
    """Write profiles of one device, one a phase, with the facts about where they were measured, among a run's files or
    others."""
    files.write_json(name, facts | {"profiles": {p.workload.phase: p.to_dict() for p in profiles}})


def load_profile(run: Fitted, phase: str, kind: str) -> Profile:
    """The run's profile of "prefill" or "decode". Raises ``InputError`` about ``kind`` if there is none, and about the
    file if it is damaged."""
    grid, remedy = run.grid, f"Measure one first: ppf profile {run.path}"
    require_equal_layers(grid.structure, kind, run.path)
    if not run.files.exists(PROFILE):
        raise InputError(kind, run.path, "has no latency profile", remedy)
    files = run.files.telling(f"Measure it again: ppf profile {run.path}")
    profile = files.read_json(PROFILE, _Profiles).profiles.get(phase)
    if profile is None or profile.workload.phase != phase or min(profile.workload.batch, profile.workload.tokens) < 1:
        raise InputError(kind, run.path, f"its {PROFILE} has no {phase} profile", remedy)
    if (len(profile.attention), len(profile.ffn)) != (grid.maximum[0] + 1, grid.maximum[-1] + 1):
        raise InputError(kind, run.path, "its profile is of another grid", remedy)
    return profile
