"""The cells of a comparison: one method at one ratio each, computed once and kept in a file."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from ...choose.budget import RatioBudget
from ...deliver.results import choose
from ...errors import InputError
from ...fitting.evaluation import Evaluator
from ...fitting.experience import Experience
from ...fitting.session import Session
from ...model.policy import Policy
from ...progress import Progress, silent
from ...storage.schemas import Count, Finite, Nonnegative
from ...storage.sealed import Sealed
from ..peers import PEERS, PeerStatistics
from .asis import AS_IS, measure_as_is
from .methods import Method

_ROUNDING = 1e-9


class _Cell(msgspec.Struct):
    """One file."""

    method: str
    label: str
    ours: bool
    refit: bool
    requested_ratio: Finite
    delivered_ratio: Finite
    log_perplexity: Finite
    perplexity: Nonnegative
    evaluations_given: Count
    evaluations: Nonnegative
    seconds: Nonnegative
    policy: dict[str, Any]


class Cells:
    """Computes cells of one session's run and keeps them among ``files``.

    ``report`` int64 [N, T] is the text on which perplexities are reported; policies are chosen on the run's evaluation
    split. Every allocation starts from nothing but the run, in whatever order and company it is computed.
    """

    def __init__(self, session: Session, report: Tensor, files: Sealed, seed: int):
        self.session, self.report, self.files, self.seed = session, report, files, seed
        self.run = session.run

    @cached_property
    def reporter(self) -> Evaluator:
        """Of the text on which perplexities are reported."""
        return self.session.evaluator(sequences=self.report)

    @cached_property
    def statistics(self) -> PeerStatistics:
        return PeerStatistics.of_run(self.run, self.session.evaluator(), 0, self.seed)

    def cell(self, method: Method, ratio: float) -> dict[str, Any]:
        """What one method gives at one ratio: from its file if that is there, else computed and stored. Raises
        ``InputError`` for a damaged file."""
        name = f"{method.key(ratio)}.json"
        if not self.files.exists(name):
            self.files.write_json(name, self._compute(method, ratio))
        cell = msgspec.to_builtins(self.files.read_json(name, _Cell))
        if (problem := self._contradiction(cell, method, ratio)) is not None:
            raise self.files.damaged(name, problem)
        return cell

    def _contradiction(self, cell: dict[str, Any], method: Method, ratio: float) -> str | None:
        """What a cell says that cannot be, or None."""
        try:
            policy = Policy.from_dict(cell["policy"])
            ratio_of_policy = self.run.grid.ratio(policy)
        except InputError as error:
            return f"{error.field} {error.problem}"
        if (cell["method"], cell["requested_ratio"]) != (method.name, ratio):
            return f"is {cell['method']} at {cell['requested_ratio']}, not {method.name} at {ratio}"
        if abs(cell["delivered_ratio"] - ratio_of_policy) > _ROUNDING:
            return "its ratio is not that of its policy"
        if abs(cell["perplexity"] / math.exp(cell["log_perplexity"]) - 1) > _ROUNDING:
            return "its perplexity is not that of its log-perplexity"
        return None

    def _compute(self, method: Method, ratio: float) -> dict[str, Any]:
        statistics = self.statistics.with_budget(method.evaluations, self.seed)  # observing is nobody's own time
        start = time.perf_counter()
        policy, spent, value = self._allocate(method, ratio, statistics)
        seconds = time.perf_counter() - start
        if value is None:
            value = self.reporter.log_perplexity(policy)
        return {
            "method": method.name,
            "label": method.label,
            "ours": method.is_ours,
            "refit": method.name not in AS_IS,
            "requested_ratio": ratio,
            "delivered_ratio": self.run.grid.ratio(policy),
            "log_perplexity": value,
            "perplexity": math.exp(value),
            "evaluations_given": method.evaluations,
            "evaluations": spent,
            "seconds": seconds,
            "policy": policy.to_dict(),
        }

    def _allocate(self, method: Method, ratio: float, statistics: PeerStatistics) -> tuple[Policy, float, float | None]:
        """The policy, the evaluations it took, and its log-perplexity where the evaluator cannot say it."""
        if method.name in AS_IS:
            policy, value = measure_as_is(self.session, method.name, statistics, ratio, self.report)
            return policy, 0, value
        if method.name == "dynamic":
            return choose(self.session, ratio).policy, 0, None
        if method.name == "static":
            return self._search(ratio, method.evaluations), method.evaluations, None
        policy = PEERS[method.name].allocate(self.run.structure, statistics, RatioBudget(self.run.grid, ratio))
        return policy, statistics.meter.spent, None

    def _search(self, ratio: float, evaluations: int) -> Policy:
        """PPF's static mode on a copy of the run's experience, so that no cell learns from another."""
        with tempfile.TemporaryDirectory(prefix="ppf-compare-") as folder:
            store = Experience(Path(folder) / "experience.sqlite")
            for row in self.run.experience.rows():
                store.append(row)
            try:
                return choose(self.session, ratio, evaluations, experience=store).policy
            finally:
                store.close()


def compute(
    cells: Cells, methods: Sequence[Method], ratios: Sequence[float], progress: Progress = silent
) -> list[dict[str, Any]]:
    """All cells, method by method; what is asked for twice stands there once."""
    wanted, found = list(dict.fromkeys((method, ratio) for method in methods for ratio in ratios)), []
    progress("compare", 0, len(wanted))
    for method, ratio in wanted:
        found.append(cells.cell(method, ratio))
        progress("compare", len(found), len(wanted))
    return found
