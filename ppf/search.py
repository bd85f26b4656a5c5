"""Static mode: spend true evaluations to find the best policy of one budget.

Starts from the agent's answers and the best measured policies near the budget, breeds candidates that the predictor
likes, measures the best few, learns from them, and repeats until the evaluations are spent. A different ensemble member
judges each time, so that the search cannot settle on one network's mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .agent import Agent
from .collection import measure
from .errors import InputError
from .evaluation import Evaluator
from .experience import Evaluation, Experience
from .policy import Policy
from .predictor import Predictor
from .progress import Progress, silent
from .projection import Projector, check_ratio, nearest
from .sampling import mutate
from .training import fit_predictor

# Search rows stand after every round of the fit loop.
SEARCH_ROUND = 1000
_PARENTS, _OFFSPRING, _GENERATIONS = 8, 512, 4
_REFIT_STEPS = 150
_PATIENCE = 200  # rounds of mutation without a new policy


class Search:
    """One search; ``predictor`` is refitted in place as measurements come in, ``experience`` grows."""

    def __init__(
        self, evaluator: Evaluator, experience: Experience, predictor: Predictor, agent: Agent, ratio: float, seed: int
    ):
        check_ratio(ratio, evaluator.grid)
        self.evaluator, self.experience, self.predictor, self.agent = evaluator, experience, predictor, agent
        self.grid, self.ratio, self.seed = evaluator.grid, ratio, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.projector = Projector(self.grid)
        self.measured: dict[Policy, float] = {}

    def run(self, evaluations: int, progress: Progress = silent) -> tuple[Policy, float]:
        """The best policy found with ``evaluations`` true evaluations, and its measured log-perplexity.

        Policies that the store already holds are free. Raises ``InputError`` for fewer than one evaluation, and for
        more than the budget has policies.
        """
        if evaluations < 1:
            raise InputError("search", evaluations, "measures nothing", "Use at least 1 evaluation")
        batch = max(4, min(25, evaluations // 8))
        pool, before = self._start(), len(self.experience)
        while (spent := len(self.experience) - before) < evaluations:
            for policy in self._unmeasured(pool, min(batch, evaluations - spent)):
                value = measure(self.evaluator, self.experience, policy, SEARCH_ROUND, "search")
                self.measured[policy] = value
                progress("search", len(self.experience) - before, evaluations)
            if len(self.experience) - before < evaluations:
                self._refit()
                pool = self._breed()
        best = min(self.measured, key=self.measured.__getitem__)
        return best, self.measured[best]

    def _start(self) -> Tensor:
        """The agent's answer, the best measured policies moved to this budget, and noisy answers, int64 [P, S]."""
        ratio = torch.tensor([self.ratio])
        near = sorted(self.experience.rows(), key=lambda row: row.log_perplexity + 100 * abs(row.ratio - self.ratio))
        known = self.grid.encode([row.policy for row in near[:_PARENTS]])
        moved = self.projector(nearest(known / self.projector.maximum, self.grid), ratio.expand(len(known)))
        noisy = self.agent(ratio.expand(_PARENTS), noise=0.3, generator=self.generator)
        return torch.cat((self.agent(ratio), moved, noisy))

    def _unmeasured(self, pool: Tensor, count: int) -> list[Policy]:
        """The first ``count`` policies of ``pool`` this search has not measured; neighbours fill up what is missing."""
        chosen: dict[Policy, None] = {}
        for _ in range(_PATIENCE):
            for policy in self.grid.decode(pool):
                if policy not in self.measured:
                    chosen.setdefault(policy)
                if len(chosen) == count:
                    return list(chosen)
            pool = mutate(pool, self.grid, self.generator, ratio=self.ratio)
        remedy = f"Use at most {len(self.measured) + len(chosen)} evaluations"
        raise InputError("search", self.ratio, "has no more policies than these at this ratio", remedy)

    def _refit(self) -> None:
        rows: Sequence[Evaluation] = self.experience.rows()
        levels = self.grid.encode([row.policy for row in rows])
        values = torch.tensor([row.log_perplexity for row in rows])
        fit_predictor(self.predictor, levels, values, self.seed, steps=_REFIT_STEPS, fresh=False)

    @torch.no_grad()
    def _breed(self) -> Tensor:
        """Offspring of the best measured policies, int64 [P, S], most promising first."""
        best = sorted(self.measured, key=self.measured.__getitem__)[:_PARENTS]
        parents = self.grid.encode(best)
        member = int(torch.randint(self.predictor.members, (1,), generator=self.generator))
        for _ in range(_GENERATIONS):
            chosen = torch.randint(len(parents), (_OFFSPRING,), generator=self.generator)
            mutants = mutate(parents[chosen], self.grid, self.generator, ratio=self.ratio)
            pool = torch.cat((parents, mutants)).unique(dim=0)
            parents = pool[self._judge(pool, member).argsort()[: 8 * _PARENTS]]
        return parents

    def _judge(self, levels: Tensor, member: int) -> Tensor:
        return self.predictor.members_at(levels)[member].cpu()
