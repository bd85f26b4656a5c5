"""What a fit is asked for. Two fits with equal settings and models give the same run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ...choose import agent as agent_kinds
from ...choose import predictor as predictor_kinds
from ...errors import InputError
from ...model.grid import Grid, portable_multiple
from ...model.structure import Structure
from ..ranking import check_ranking


@dataclass(frozen=True)
class Settings:
    """Settings of ``ppf fit``; all counts in tokens or evaluations.

    With 0 ``evaluations`` there is calibration alone, and policies come from error energies (:mod:`ppf.fitting.first`).
    """

    evaluations: int = 600
    seed: int = 0
    ranking: str = "flap-wifv"
    ffn_multiple: int = 64
    sequence_length: int = 512
    calibration_tokens: int = 131_072
    evaluation_tokens: int = 16_384
    predictor: str = predictor_kinds.DEFAULT
    agent: str = agent_kinds.DEFAULT
    early_stop: bool = False
    portable: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        check_ranking(self.ranking)
        predictor_kinds.predictor_named(self.predictor)
        agent_kinds.trainer_named(self.agent)
        smallest = {
            "seed": (0, "seeds are not negative"),
            "ffn_multiple": (1, "widths are whole channels"),
            "sequence_length": (2, "a shorter sequence predicts no token"),
            "calibration_tokens": (1, "there must be something to calibrate on"),
            "evaluation_tokens": (1, "there must be something to evaluate on"),
        }
        for name, (least, why) in smallest.items():
            self._check_count(name, least, why, f"Use a whole number, at least {least}")
        remedy = f"Use a whole number, at least {MINIMUM_EVALUATIONS}, or 0 for calibration alone"
        least = 0 if self.evaluations == 0 else MINIMUM_EVALUATIONS
        self._check_count("evaluations", least, "the predictor cannot learn from fewer", remedy)

    def _check_count(self, name: str, least: int, why: str, remedy: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(name.replace("_", "-"), value, why, remedy)
        if value > _MOST:
            raise InputError(name.replace("_", "-"), value, "is more than anything counts to", f"At most {_MOST}")

    def _check_types(self) -> None:
        for name, kind, said in (
            ("ranking", str, "a name"),
            ("predictor", str, "a name"),
            ("agent", str, "a name"),
            ("early_stop", bool, "true or false"),
            ("portable", bool, "true or false"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise InputError(name.replace("_", "-"), value, f"is not {said}", f"Give {said}")

    def grid(self, structure: Structure) -> Grid:
        """The grid of policies that a fit with these settings learns."""
        return Grid(structure, self.ffn_multiple, self.portable)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        """Inverse of :meth:`to_dict`. Raises ``InputError`` for a name that is not a setting, and values that none
        has."""
        return settings_of(None, data)

    def difference(self, other: Settings) -> str | None:
        """The name of the first setting in which the two differ, or None."""
        return next((f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)), None)


def settings_of(settings: Settings | None, values: Mapping[str, Any]) -> Settings:
    """``settings``, or the ones that ``values`` name. Raises ``InputError`` for both, and for names of no setting."""
    names = [field.name for field in fields(Settings)]
    for name, value in values.items():
        if name not in names:
            raise InputError(name, value, "is not an argument of a fit", f"Its settings are {', '.join(names)}")
    if settings is not None and values:
        problem = "is given by name, and settings= as well"
        name, value = next(iter(values.items()))
        raise InputError(name, value, problem, "Put it into settings=, or drop that")
    return settings or Settings(**values)


_MOST = 1 << 48
# Fewer rows than this leave some members of the predictor without a batch to learn from.
MINIMUM_EVALUATIONS = 24


def portable_settings(settings: Settings, structure: Structure) -> Settings:
    """``settings`` on a portable grid: a larger FFN multiple than the portable one stays if it is a multiple of it."""
    step = portable_multiple(structure)
    return settings if settings.ffn_multiple % step == 0 else replace(settings, ffn_multiple=step)
