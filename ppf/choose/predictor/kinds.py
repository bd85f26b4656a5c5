"""The kinds of predictor by name. A run names its kind in its settings."""

from __future__ import annotations

from torch import Tensor

from ...errors import InputError
from ...model.grid import Grid
from .base import Predictor
from .cnn import CNN
from .gaussian import GaussianProcess
from .mlp import MLP

KINDS: dict[str, type[Predictor]] = {kind.kind: kind for kind in (GaussianProcess, MLP, CNN)}
DEFAULT = GaussianProcess.kind


def predictor_named(kind: str) -> type[Predictor]:
    """The class of a kind. Raises ``InputError`` for a name that is none."""
    if kind not in KINDS:
        raise InputError("predictor", kind, "is no kind of predictor", f"Use one of {sorted(KINDS)}")
    return KINDS[kind]


def make_predictor(kind: str, grid: Grid, energies: Tensor | None = None) -> Predictor:
    """An untrained predictor of a kind, on the CPU. Raises ``InputError`` for a name that is none.

    ``energies`` [S, K] are the library's error energies of every level, which the Gaussian process starts from; they
    are saved with it. Networks gain nothing from them (dev/LOG.md) and do without.
    """
    chosen = predictor_named(kind)
    return chosen(grid, energies) if chosen is GaussianProcess else chosen(grid)
