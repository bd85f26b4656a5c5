"""From preferences to policies that meet a budget exactly.

A preference gives every sub-layer a utility for each of its levels. The projection picks the levels with the highest
total utility whose cost is the budget. A Lagrange multiplier, found by sections of its range, separates the steps of a
level that pay from those that do not; then all steps stand in one sorted order, and the budget cuts it. At the cut a
dear step may not fit: then either cheap steps that come later fill the gap, or the dear one is taken and cheap ones
that came before make room, whichever ends nearer to the budget. There is no penalty to tune, and no loop that depends
on the data: one call is a fixed list of tensor operations, on a GPU without a synchronisation.

What is guaranteed where there are two step costs, one of attention and one of FFN, as in every family: the cost is
within half a step of the cheaper of what was asked for, provided that the cheaper steps together span a dearer one;
otherwise it is the nearest that there is. Of a ceiling, which no policy may exceed, it is less than one cheaper step
below, or else the nearest below. Measured latencies, and layers whose steps have many costs, are refined by exchanges
(:mod:`ppf.choose.budget.exchange`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...model.grid import Grid
from .costs import Costs, parameters
from .exchange import Refinement
from .figures import rounded

# The multiplier is found to one part in 2¹⁶ of its range: in few wide rounds for one policy, where calls take the time,
# in many narrow ones for batches, where arithmetic does. (Sections a round, rounds), and the elements a round may have.
_SECTIONS = ((63, 3), (15, 4), (3, 8), (1, 16))
_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 23}


def check_ratio(ratio: float, grid: Grid) -> None:
    """Raise ``InputError`` unless 0 < ratio ≤ what the structure can give."""
    if not 0 < ratio < 1:  # also refuses NaN
        raise InputError("ratio", ratio, "is not a share of parameters", "Use a number between 0 and 1, such as 0.3")
    if ratio > grid.maximum_ratio:
        stays = "portable policies keep all attention" if grid.portable else "layer 0 keeps some attention"
        remedy = f"The maximum for this model is {rounded(grid.maximum_ratio, 4, up=False)} ({stays})"
        raise InputError("ratio", ratio, "is more than the structure can give", remedy)


class _Steps(NamedTuple):
    """N steps of a level that a cut chooses from, the same number W for every sub-layer: N = S·W, [B, N] each."""

    low: Tensor  # int64 [B, S]: levels if no step is taken
    key: Tensor  # fp32: what they are taken by, highest first; never rises with the level of one sub-layer
    cost: Tensor  # fp64
    gain: Tensor  # fp32: utility
    free: Tensor  # bool: may be taken or not
    forced: Tensor  # bool: is always taken
    cheap: Tensor  # bool: free, of the cheapest sub-layers

    def sorted(self) -> tuple[Tensor, _Steps]:
        """Where each step stood, and the steps in the order of their keys."""
        index = self.key.argsort(dim=1, descending=True, stable=True)
        return index, _Steps(self.low, *(part.expand_as(index).gather(1, index) for part in self[1:]))


class Projector(nn.Module):
    """Projects utilities fp32 [B, S, K] onto the policies of a budget; K = ``grid.levels``. Costs are parameters unless
    ``costs`` says otherwise. A module only to follow its owner's device: it has nothing to learn and nothing to save.
    """

    maximum: Tensor  # [S]
    minimum: Tensor  # [S]
    top: Tensor  # [S]: maximum, but 1 where that is 0
    step_cost: Tensor  # fp64 [S]: parameters a level, whatever the costs are
    allowed: Tensor  # bool [S, K]
    relative_cost: Tensor  # fp32 [S, K]: share of the largest cost, so that the multiplier's range suits every model
    table: Tensor  # fp64 [S, K]
    steps: Tensor  # fp64 [S·(K − 1)]: cost of the step up to each level from 1 on, 0 beyond the maximum
    free: Tensor  # bool, the same shape: steps that may be taken or not
    forced: Tensor  # bool: steps that are always taken
    cheap: Tensor  # bool: free steps of the cheapest sub-layers

    def __init__(self, grid: Grid, costs: Costs | None = None):
        super().__init__()
        self.grid, costs = grid, costs or parameters(grid)
        level = torch.arange(grid.levels)
        maximum, minimum = torch.tensor(grid.maximum), torch.tensor(grid.minimum)
        allowed = (level >= minimum[:, None]) & (level <= maximum[:, None])
        steps, free = costs.table.diff(dim=1), allowed[:, 1:] & allowed[:, :-1]
        self.total, self.base = (float(costs.table[:, level].sum()) for level in (-1, 0))
        kinds = steps[free].unique()
        self.cheapest, self.dearest = float(kinds[kinds > 0].min()), float(kinds.max())
        is_linear = bool((kinds > 0).all()) and all(len(s[f].unique()) < 2 for s, f in zip(steps, free, strict=True))
        self.is_regular = is_linear and len(kinds) <= 2
        cheap = free & (steps == self.cheapest)
        # Do all cheap steps together make up for a dear one? Where they do not, two dear ones may end nearer than one.
        self.spans = float(cheap.sum()) * self.cheapest >= self.dearest
        self.refinement = Refinement(costs.table, minimum, maximum, self.cheapest if is_linear else None)
        for name, tensor in (
            ("maximum", maximum),
            ("minimum", minimum),
            ("top", torch.tensor(grid.top)),
            ("step_cost", torch.tensor(grid.step_cost, dtype=torch.float64)),
            ("allowed", allowed),
            ("relative_cost", (costs.table / self.total).float()),
            ("table", costs.table),
            ("steps", steps.flatten()),
            ("free", free.flatten()),
            ("forced", (level[1:] <= minimum[:, None]).flatten()),
            ("cheap", cheap.flatten()),
        ):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, utility: Tensor, ratio: Tensor, ceiling: bool = False) -> Tensor:
        """Levels int64 [B, S] of the policies that remove ``ratio`` [B] of the largest cost; with ``ceiling``, at least
        as much."""
        return self.meet(utility, self._target(ratio, ceiling), ceiling)

    def meet(self, utility: Tensor, target: Tensor, ceiling: bool = False) -> Tensor:
        """Levels int64 [B, S] of the policies whose cost, constant left out, is nearest to ``target`` fp64 [B]; with
        ``ceiling``, nearest of those that do not exceed it."""
        utility = utility.masked_fill(~self.allowed, -torch.inf)
        steps = _Steps(
            low=torch.zeros(utility.shape[:2], dtype=torch.int64, device=utility.device),
            key=self._keys(utility, target),
            cost=self.steps[None],
            gain=utility.diff(dim=2).flatten(1).nan_to_num(0, 0, 0),
            free=self.free[None],
            forced=self.forced[None],
            cheap=self.cheap[None],
        )
        levels = self._cut(steps, target - self.base, ceiling)
        return levels if self.is_regular else self.refinement(levels, utility, target, ceiling)

    def nearest(
        self, fractions: Tensor, ratio: Tensor, weight: Tensor | None = None, ceiling: bool = False
    ) -> Tensor:  # fmt: skip
        """Levels int64 [B, S] that remove ``ratio`` [B] and lie nearest to keeping ``fractions`` [B, S].

        The same as :meth:`forward` of :func:`nearest`, times ``weight`` [B, S] if given, but faster. Such utilities are
        parabolas: a step from level k of m has the slope weight · (2·fraction − (2k + 1)/m), the levels at a multiplier
        follow at once, and only the few steps around them are sorted. Costs must be parameters.
        """
        weight = torch.ones_like(fractions) if weight is None else weight
        if not self.is_regular:
            return self(nearest(fractions, self.grid) * weight[..., None], ratio, ceiling)
        target = self._target(ratio, ceiling)
        window = min(math.ceil(self.dearest / self.cheapest) + 1, self.grid.levels - 1)
        reached = self._parabolic(fractions, weight, self._parabolic_multiplier(fractions, weight, target)[:, None])
        low = (reached - window).clamp_min(0).maximum(self.minimum)
        level = (low[..., None] + torch.arange(2 * window, device=low.device)).float()
        key = weight[..., None] * (2 * fractions[..., None] - (2 * level + 1) / self.top[:, None])
        free = level < self.maximum[:, None]
        cost, cheap = self.step_cost[:, None].expand_as(level), free & (self.step_cost == self.cheapest)[:, None]
        parts = key.masked_fill(~free, -torch.inf), cost * free, key * cost.float(), free, torch.zeros_like(free), cheap
        return self._cut(_Steps(low, *(part.flatten(1) for part in parts)), target - self.cost(low), ceiling)

    def _target(self, ratio: Tensor, ceiling: bool) -> Tensor:
        """The cost fp64 [B] that a ratio leaves. Parameters are whole numbers: a ceiling between two is the lower one,
        and one that rounding moved below a whole number is that."""
        target = (1 - ratio.double()) * self.total
        return (target + 1e-3).floor() if ceiling else target

    def cost(self, levels: Tensor) -> Tensor:
        """Cost, constant left out, fp64 [B], of int64 levels [B, S]."""
        return self.table.expand(len(levels), -1, -1).gather(2, levels[..., None]).sum((1, 2))

    def _slopes(self, utility: Tensor) -> Tensor:
        """Utility a cost of every step, fp32 [B, N]; infinite for steps that are forced, −infinite for impossible."""
        cost = (self.steps / self.total).float().clamp_min(1e-12)
        slopes = utility.diff(dim=2).flatten(1) / cost
        return slopes.masked_fill(~self.free, -torch.inf).masked_fill(self.forced, torch.inf)

    def _keys(self, utility: Tensor, target: Tensor) -> Tensor:
        """What steps are sorted by, fp32 [B, N], never rising with the level of one sub-layer.

        A step is worth its slope, but one that pays only together with the next ones (where utilities are not concave)
        must not stand behind them: the multiplier says which levels are reached together.
        """
        slopes = self._slopes(utility)
        multiplier = self._multiplier(utility, slopes, target)
        reached = (utility - multiplier[:, None, None] * self.relative_cost).argmax(-1)
        slopes = slopes.view(len(utility), -1, self.grid.levels - 1)
        below = torch.arange(1, self.grid.levels, device=slopes.device) <= reached[..., None]
        bound = multiplier[:, None, None]
        # Up to the level reached, the greatest slope from here to there; beyond it, the least one so far.
        rising = slopes.masked_fill(~below, -torch.inf).flip(-1).cummax(-1).values.flip(-1)
        falling = slopes.masked_fill(below, torch.inf).cummin(-1).values
        return torch.where(below, torch.maximum(rising, bound), torch.minimum(falling, bound)).flatten(1)

    def _multiplier(self, utility: Tensor, slopes: Tensor, target: Tensor) -> Tensor:
        """The smallest multiplier μ [B], to the resolution, whose best levels by utility − μ·cost fit ``target``."""

        def cost(multiplier: Tensor) -> Tensor:
            scores = torch.addcmul(utility[:, None], multiplier[:, :, None, None], self.relative_cost, value=-1)
            levels = scores.argmax(-1)
            return self.table.expand(*levels.shape[:2], -1, -1).gather(3, levels[..., None]).sum((2, 3))

        low = slopes.masked_fill(~self.free, torch.inf).amin(1) - 1e-3
        high = slopes.masked_fill(~self.free, -torch.inf).amax(1) + 1e-3
        return _sections(low, high, cost, target, utility.numel())

    def _parabolic(self, fractions: Tensor, weight: Tensor, multiplier: Tensor) -> Tensor:
        """Levels of the parabolas of :meth:`nearest` at multipliers that broadcast against fractions, int64."""
        level = (self.maximum * (fractions - multiplier / (2 * weight)) + 0.5).floor().long()
        return level.maximum(self.minimum).minimum(self.maximum)

    def _parabolic_multiplier(self, fractions: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        def cost(multiplier: Tensor) -> Tensor:
            levels = self._parabolic(fractions[:, None], weight[:, None], multiplier[..., None])
            return (levels * self.step_cost).sum(-1)

        edge = 2 * (weight * (1 + fractions.abs())).amax(1) + 1e-3
        # A parabola's level takes several operations where an argmax reads one number.
        return _sections(-edge, edge, cost, target, 8 * fractions.numel())

    def _cut(self, steps: _Steps, target: Tensor, ceiling: bool) -> Tensor:
        """Take the steps by their keys as far as ``target`` fp64 [B] goes beyond ``low``, and settle what is left."""
        index, order = steps.sorted()
        # A target is rarely a round number: what misses it by less than any unit fits, unless it must not.
        fits = order.cost.cumsum(1) <= target[:, None] + (0 if ceiling else 1e-6 * self.cheapest)
        taken = order.free & fits | order.forced
        if self.is_regular:
            taken = self._settled(order, taken, target - (order.cost * taken).sum(1), ceiling)
        chosen = torch.zeros_like(taken).scatter(1, index, taken)
        return steps.low + chosen.view(*steps.low.shape, -1).sum(2)

    def _settled(self, order: _Steps, taken: Tensor, gap: Tensor, ceiling: bool) -> Tensor:
        """Taken steps bool [B, N] after the gap [B] is filled with later cheap steps, or else with one dear step that
        earlier cheap ones make room for; of equally near ones the better.

        Cheap steps that do not span a dear one may all have to go for two dear ones; of a ceiling never, for then one
        dear step more is always worth more than all cheap ones.
        """
        best, left = self._shifted(order, taken, gap, 0, ceiling)
        for dear in (1,) if self.spans or ceiling else (1, 2):
            other, other_left = self._shifted(order, taken, gap, dear, ceiling)
            better = ((other.float() - best.float()) * order.gain).sum(1) > 0
            nearer = other_left - left
            tie = nearer.abs() <= 1e-6 * self.cheapest
            chosen = (nearer < 0) & ~tie | tie & better
            best, left = torch.where(chosen[:, None], other, best), torch.where(chosen, other_left, left)
        return best

    def _shifted(self, order: _Steps, taken: Tensor, gap: Tensor, dear: int, ceiling: bool) -> tuple[Tensor, Tensor]:
        """Taken steps with ``dear`` more dear ones, and as many more or fewer cheap ones as come nearest; and how far
        from the target that is, fp64 [B], infinite for what is not there or not allowed."""
        is_dear = order.free & ~order.cheap
        dears, cheaps = ((taken & kind).sum(1) for kind in (is_dear, order.cheap))
        gap = gap - dear * self.dearest
        count = gap / self.cheapest
        count = torch.minimum(cheaps + (count.floor() if ceiling else count.round()), order.cheap.sum(1)).clamp_min(0)
        chosen = is_dear & (is_dear.cumsum(1) <= (dears + dear)[:, None])
        chosen = chosen | order.cheap & (order.cheap.cumsum(1) <= count[:, None]) | order.forced
        left = gap - (count - cheaps) * self.cheapest
        missing = dears + dear > is_dear.sum(1)
        return chosen, left.abs().masked_fill(missing | (left < 0) if ceiling else missing, torch.inf)


def _sections(low: Tensor, high: Tensor, cost: Callable[[Tensor], Tensor], target: Tensor, elements: int) -> Tensor:
    """The smallest multiplier between ``low`` and ``high`` [B], to the resolution, at which ``cost`` fits ``target``.

    ``cost`` takes multipliers [B, M] to costs fp64 [B, M], which fall as they rise; ``elements`` is what one multiplier
    a row works on.
    """
    room = _ELEMENTS[low.device.type] // elements
    sections, rounds = next(((s, r) for s, r in _SECTIONS if s <= room), _SECTIONS[-1])
    place = torch.arange(1, sections + 1, device=low.device) / (sections + 1)
    for _ in range(rounds):
        width = (high - low) / (sections + 1)
        over = (cost(low[:, None] + (high - low)[:, None] * place) > target[:, None]).sum(1)
        low, high = low + over * width, low + (over + 1) * width
    return high


@lru_cache(maxsize=64)
def projector_of(grid: Grid, device: torch.device) -> Projector:
    """A projector of parameters, made once for each grid and device."""
    return Projector(grid).to(device)


def nearest(fractions: Tensor, grid: Grid) -> Tensor:
    """Utilities fp32 [B, S, K] that pull every sub-layer towards kept ``fractions`` [B, S], weighted by its cost."""
    level, weight = _scales(grid, fractions.device)
    return -(level - fractions[..., None]).square() * weight[:, None]


@lru_cache(maxsize=64)
def _scales(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every level as a share of the dense width, fp32 [S, K], and each sub-layer's share of all parameters, [S]."""
    maximum = torch.tensor(grid.maximum)
    weight = maximum * torch.tensor(grid.step_cost) / grid.structure.decoder_parameters
    return (torch.arange(grid.levels) / torch.tensor(grid.top)[:, None]).to(device), weight.to(device)
