"""Budgets: random structures, kinds and limits. No policy costs more than was asked for."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from .calls import as_a_command
from .children import run
from .ground import Ground
from .judging import judged
from .outcomes import OVER, SUCCESS, Verdict

_KINDS = ("memory-gb", "flops", "latency-ms", "tokens-per-second")


def attempt(ground: Ground, seed: int) -> Verdict:
    with ground.scratch() as here:
        ended = run(lambda: as_a_command(lambda: print(_asked(seed))), here)
        what, _, problem = ended.out.strip().partition(" | ")
        verdict = judged(ended, what or f"seed {seed}")
        return Verdict(OVER, what, problem) if verdict.outcome == SUCCESS and problem else verdict


def _asked(seed: int) -> str:
    """What was asked, and after a bar by how much the worst of the policies that may be answered is over."""
    from ppf.choose.agent import Agent

    draw = random.Random(f"budgets {seed}")
    grid = _grid(draw)
    budget = _budget(draw, grid)
    what = f"{budget.name} {budget.requested!r} of {grid.structure.layers} layers"
    policies = grid.decode(budget.candidates(Agent(grid).eval()))
    shares = [budget.predicted(policy) / budget.requested for policy in policies]
    over = 1 / min(shares) - 1 if budget.name == "tokens-per-second" else max(shares) - 1
    return f"{what} | over by {over:.3%} ({over:g})" if over > 0 else what


def _grid(draw: random.Random) -> Any:
    from structures import llama_structure

    from ppf.model.grid import Grid

    layers, groups, heads = draw.randint(1, 24), draw.choice((1, 2, 3, 4, 8, 12)), draw.choice((1, 2, 4, 7))
    head_dim, multiple = draw.choice((8, 16, 64, 128)), draw.choice((1, 8, 16, 64, 96))
    hidden, channels = draw.choice((48, 64, 576, 1024)), multiple * draw.randint(1, 24)
    structure = llama_structure(layers, hidden, groups, heads, head_dim, channels)
    if draw.random() < 0.3:  # such as a pruned model has
        uneven = [replace(s, units=multiple * draw.randint(1, s.units // multiple)) for s in structure.ffn]
        structure = replace(structure, ffn=tuple(uneven))
    return Grid(structure, multiple)


def _budget(draw: random.Random, grid: Any) -> Any:
    """Of a random kind, with a limit anywhere from the smallest policy's to the dense model's cost."""
    from ppf.choose import budget as kinds
    from ppf.choose.budget.costs import token_flops, weight_bytes

    name = draw.choice(_KINDS[:2] if len({s.units for s in grid.structure.ffn}) > 1 else _KINDS)
    if name == "memory-gb":
        costs = weight_bytes(grid, draw.choice((2, 4)), draw.choice((0, 10**6)))
        return kinds.MemoryBudget(grid, _limit(draw, costs, grid) / 1e9, costs)
    if name == "flops":
        context, vocabulary = draw.choice((0, 1, 512, 32_768, 10**6)), draw.choice((300, 32_000))
        return kinds.FlopsBudget(grid, _limit(draw, token_flops(grid, context, vocabulary), grid), context, vocabulary)
    profile = _profile(draw, grid, "prefill" if name == "latency-ms" else "decode")
    limit = _limit(draw, profile.costs(grid), grid)
    if name == "latency-ms":
        return kinds.LatencyBudget(grid, limit, profile)
    return kinds.ThroughputBudget(grid, 1e3 * profile.workload.batch / limit, profile)


def _limit(draw: random.Random, costs: Any, grid: Any) -> float:
    least, most = costs.range(grid)
    return least + draw.random() ** draw.choice((0.3, 1, 3)) * (most - least) * 0.999


def _profile(draw: random.Random, grid: Any, phase: str) -> Any:
    """Milliseconds that jump and stand still, as measured ones do."""
    from ppf.choose.budget import Profile
    from ppf.fast.timing import Workload

    def times(levels: int) -> tuple[float, ...]:
        values = [draw.choice((0.0, 0.1))]
        for _ in range(levels):
            values.append(values[-1] + draw.choice((0, 0, draw.random(), 10 * draw.random(), -0.1)))
        return tuple(values)

    workload = Workload(phase, draw.choice((1, 4)), 64)
    return Profile(workload, draw.choice((0.01, 2.5)), times(grid.maximum[0]), times(grid.maximum[-1]))
