"""Measuring profiles: how long a sub-layer of every width takes, in the form in which pruned models are deployed.

Nothing is timed alone: weights that stay in a cache, or kernels without their neighbours, would look too fast. Instead
whole models are timed in which all layers have the same widths, and differences are shared out over the layers. What is
left when everything is taken away (embedding, head, the host) is the constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from .._version import versions
from ..choose.budget.profile import Profile
from ..fast.timing import Workload, milliseconds, runner_of
from ..model.grid import Grid
from ..model.policy import Policy
from ..progress import Progress, silent

_LEVELS = 24  # measured for each kind of sub-layer; those between are interpolated

Build = Callable[[Policy], PreTrainedModel]
"""A model of the given widths, on the device; its weights' values do not matter."""


def measure_profile(grid: Grid, build: Build, workload: Workload, progress: Progress = silent) -> Profile:
    """Time models of equal layers, with about 24 widths of each kind of sub-layer, and share the differences out.

    All layers of ``grid`` must have the same units; see :func:`ppf.choose.budget.profile.require_equal_layers`.
    """
    layers, high = grid.structure.layers, (grid.maximum[0], grid.maximum[-1])
    points = [_spread(limit) for limit in high]
    total, done = 3 + sum(map(len, points)), 0

    def timed(attention: list[int], ffn: int) -> float:
        """Of a model with these levels of attention, and one level of every layer's FFN."""
        nonlocal done
        widths = [level * grid.steps[0] for level in attention], [ffn * grid.steps[-1]] * layers
        value = milliseconds(build(Policy(*widths)), workload)
        done += 1
        progress("profile", done, total)
        return value

    one, first = [1] * layers, [1] + [0] * (layers - 1)
    least = timed(first, 0)
    base = timed(one, 0) if layers > 1 else least
    # One level of attention is what every other model has: its cost is what the layers but the first add.
    level = (base - least) / max(1, layers - 1)
    attention = {0: 0.0} | {n: level + (timed([n] * layers, 0) - base) / layers for n in points[0]}
    ffn = {0: 0.0} | {n: (timed(one, n) - base) / layers for n in points[1]}
    return Profile(workload, max(least - level, 0.0), _filled(attention, high[0]), _filled(ffn, high[1]))


def profile_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Where and with what a profile of ``model`` is measured."""
    return runner_of(model) | {"dtype": str(model.dtype).removeprefix("torch."), "versions": versions()}


def _spread(limit: int) -> list[int]:
    """At most 24 of the levels 1…limit, evenly spaced, the last among them."""
    count = min(limit, _LEVELS)
    return sorted({max(1, round((index + 1) * limit / count)) for index in range(count)})


def _filled(known: dict[int, float], high: int) -> tuple[float, ...]:
    return tuple(np.interp(np.arange(high + 1), list(known), list(known.values())).tolist())
