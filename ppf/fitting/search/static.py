"""Static mode: spend true evaluations to find the best policy of one budget.

Starts from the agent's answers and the best measured policies near the budget, measures the most promising, learns from
them, and repeats until the evaluations are spent. Two sources propose. The guided one breeds on the predictor, on
islands that trust it, or go where it is unsure, to different degrees; it is worth most while little is known, and ends
in a local optimum of the predictor. The local one mutates the best measured policies, with a light screening; it is an
evolution and never runs dry. The source whose proposals get among the best gets more of the next batch.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from ...choose.agent import Agent
from ...choose.budget.projection import check_ratio
from ...choose.candidates.breeding import Effort, breed, cautious, move
from ...choose.candidates.sampling import mutate
from ...choose.predictor import Predictor
from ...choose.predictor.training import fit_predictor
from ...errors import InputError
from ...model.policy import Policy
from ...progress import Progress, silent
from ..evaluation import Evaluator
from ..evaluation.measurement import measure_many
from ..experience import SEARCH_ROUND, Experience
from ..run.settings import MINIMUM_EVALUATIONS

_BATCH = 24
_ELITES = 8
_POPULATION = 24  # what breeding starts from
_CAUTIONS = (0.0, -0.5, -1.0, -2.0)  # standard deviations added to the prediction, island by island
_EFFORT = Effort(generations=16, offspring=96, keep=32)
_SCREENED = 6  # mutants of which the local source proposes the most promising
_APART = 3  # sub-layers in which guided proposals of one batch differ at least, while there are such
_MEMORY = 0.8  # how much of its past success a source keeps with every batch
_REFIT_STEPS = 150
_PATIENCE = 200  # rounds of mutation without a new policy


class Search:
    """One search; ``predictor`` is refitted in place as measurements come in, ``experience`` grows.

    With ``ceiling`` no policy that it measures keeps more than ``ratio`` leaves; else they are the nearest to it.
    """

    def __init__(
        self, evaluator: Evaluator, experience: Experience, predictor: Predictor, agent: Agent, ratio: float, seed: int,
        ceiling: bool = False,
    ):  # fmt: skip
        check_ratio(ratio, evaluator.grid)
        self.evaluator, self.experience, self.predictor, self.agent = evaluator, experience, predictor, agent
        self.grid, self.ratio, self.seed, self.ceiling = evaluator.grid, ratio, seed, ceiling
        self.generator = torch.Generator().manual_seed(seed)
        self.measured: dict[Policy, float] = {}
        self._success = {"guided": 1.0, "local": 1.0}

    def run(self, evaluations: int, progress: Progress = silent) -> tuple[Policy, float]:
        """The best policy found with ``evaluations`` true evaluations, and its measured log-perplexity.

        Policies that the store already holds are free. Raises ``InputError`` for fewer than one evaluation, and for
        more than the budget has policies.
        """
        if evaluations < 1:
            raise InputError("search", evaluations, "measures nothing", "Use at least 1 evaluation")
        batch = max(2, min(_BATCH, evaluations // 6))
        before, spent, proposals = len(self.experience), 0, self._first(min(batch, evaluations))
        while True:
            self._measure(proposals)
            spent = len(self.experience) - before
            progress("search", spent, evaluations)
            if spent >= evaluations:
                break
            self._refit()
            proposals = self._proposals(min(batch, evaluations - spent))
        best = self._best(1)[0]
        return best, self.measured[best]

    def _measure(self, proposals: dict[Policy, str]) -> None:
        """Measure proposals, and credit the sources of those that are now among the best."""
        policies = list(proposals)
        values = measure_many(self.evaluator, self.experience, policies, SEARCH_ROUND, "search")
        self.measured |= dict(zip(policies, values, strict=True))
        won = Counter(proposals[policy] for policy in self._best(_ELITES) if policy in proposals)
        self._success = {name: 1 + _MEMORY * (value - 1) + won[name] for name, value in self._success.items()}

    def _best(self, count: int) -> list[Policy]:
        return sorted(self.measured, key=self.measured.__getitem__)[:count]

    def _first(self, count: int) -> dict[Policy, str]:
        """The agent's answer first, then what is bred from it and from the best measured policies nearby."""
        answer = self.grid.decode(self._answers(1))[0]
        return dict([(answer, "agent"), *self._guided(count).items()][:count]) if count > 1 else {answer: "agent"}

    def _proposals(self, count: int) -> dict[Policy, str]:
        share = self._success["guided"] / sum(self._success.values())
        guided = self._guided(max(1, round(share * count)))
        return guided | self._local(count - len(guided), guided)

    def _guided(self, count: int) -> dict[Policy, str]:
        """The best unmeasured policies of islands that differ in caution, taken from each in turn."""
        islands = len(_CAUTIONS)
        start = self._population().expand(islands, -1, -1)
        ratio = self._ratios(islands)
        judge = cautious(self.predictor, torch.tensor(_CAUTIONS))
        pool = breed(start, ratio, judge, self.grid, self.generator, _EFFORT, self.ceiling).cpu()
        candidates = self.grid.decode(pool.transpose(0, 1).flatten(0, 1))
        chosen: dict[Policy, str] = {}
        for apart in (_APART, 1):
            for policy in candidates:
                if len(chosen) == count:
                    return chosen
                if policy not in self.measured and all(_distance(policy, other) >= apart for other in chosen):
                    chosen[policy] = "guided"
        return chosen

    def _population(self) -> Tensor:
        """Levels int64 [1, P, S] on the agent's device: the best of this search, or else near it, and the agent's."""
        known = self._best(_POPULATION)
        if len(known) < _POPULATION:
            rows = sorted(self.experience.rows(), key=lambda r: r.log_perplexity + 100 * abs(r.ratio - self.ratio))
            known += [row.policy for row in rows[: _POPULATION - len(known)]]
        levels = self.grid.encode(known).to(self.agent.device)
        moved = move(levels, self.grid, self._ratios(len(known)), self.ceiling)
        noisy = self._answers(_POPULATION // 4, noise=0.3)
        return torch.cat((moved, self._answers(1), noisy))[None]

    def _answers(self, count: int, noise: float = 0.0) -> Tensor:
        """Levels int64 [count, S] of the agent's answers, on its device."""
        return self.agent(self._ratios(count), noise, self.generator if noise else None, self.ceiling)

    def _ratios(self, count: int) -> Tensor:
        """The budget, fp64 [count]: in fp32 a ceiling of billions of parameters would be off by hundreds."""
        return torch.full((count,), self.ratio, dtype=torch.float64, device=self.agent.device)

    def _local(self, count: int, taken: dict[Policy, str]) -> dict[Policy, str]:
        """``count`` mutants of the best measured policies, each the most promising of a few."""
        parents, chosen = self.grid.encode(self._best(_ELITES)).to(self.agent.device), {}
        for _ in range(_PATIENCE):
            if len(chosen) == count:
                return chosen
            for policy in self._screened(parents, count - len(chosen)):
                if policy not in self.measured and policy not in taken:
                    chosen[policy] = "local"
        remedy = f"Use at most {len(self.measured) + len(chosen)} evaluations"
        raise InputError("search", self.ratio, "has no more policies than these at this ratio", remedy)

    def _screened(self, parents: Tensor, count: int) -> list[Policy]:
        drawn = torch.randint(len(parents), (count,), generator=self.generator).to(parents.device)
        parents = parents[drawn].repeat_interleave(_SCREENED, 0)
        mutants = mutate(parents, self.grid, self.generator, ratio=self.ratio, ceiling=self.ceiling)
        mutants = mutants.view(count, _SCREENED, -1)
        # A mutant that is known already would win its screening again and again.
        known = torch.tensor([[p in self.measured for p in self.grid.decode(group)] for group in mutants])
        promise = self.predictor(mutants.flatten(0, 1)).mean.view(count, -1).cpu().masked_fill(known, torch.inf)
        return self.grid.decode(mutants.cpu()[torch.arange(count), promise.argmin(1)])

    def _refit(self) -> None:
        rows = self.experience.rows()
        if len(rows) < MINIMUM_EVALUATIONS:
            return
        levels = self.grid.encode([row.policy for row in rows])
        values = torch.tensor([row.log_perplexity for row in rows])
        fit_predictor(self.predictor, levels, values, self.seed, steps=_REFIT_STEPS, fresh=False)


def _distance(first: Policy, second: Policy) -> int:
    """Number of sub-layers in which two policies differ."""
    pairs = zip(first.attention + first.ffn, second.attention + second.ffn, strict=True)
    return sum(a != b for a, b in pairs)
