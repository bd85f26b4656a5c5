"""The cells of a comparison: one method at one ratio each, computed once and kept in a file."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...choose.budget import RatioBudget
from ...deliver.results import choose
from ...files import write_json
from ...fitting.experience import Experience
from ...fitting.session import Session
from ...model.policy import Policy
from ...progress import Progress, silent
from ..peers import PEERS, PeerStatistics
from .asis import AS_IS, measure_as_is
from .methods import Method


class Cells:
    """Computes cells of one session's run and keeps them in ``folder``.

    ``report`` int64 [N, T] is the text on which perplexities are reported; policies are chosen on the run's evaluation
    split. Every allocation starts from nothing but the run, in whatever order and company it is computed.
    """

    def __init__(self, session: Session, report: Tensor, folder: Path, seed: int):
        self.session, self.report, self.folder, self.seed = session, report, folder, seed
        self.run, self.reporter = session.run, session.evaluator(sequences=report)
        self.statistics = PeerStatistics.of_run(self.run, session.evaluator(), 0, seed)

    def cell(self, method: Method, ratio: float) -> dict[str, Any]:
        """What one method gives at one ratio: from its file if that is there, else computed and stored."""
        file = cell_file(self.folder, method, ratio)
        if not file.exists():
            write_json(file, self._compute(method, ratio))
        return json.loads(file.read_text(encoding="utf-8"))

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
    """All cells, method by method."""
    wanted, found = [(method, ratio) for method in methods for ratio in ratios], []
    progress("compare", 0, len(wanted))
    for method, ratio in wanted:
        found.append(cells.cell(method, ratio))
        progress("compare", len(found), len(wanted))
    return found


def cell_file(folder: Path, method: Method, ratio: float) -> Path:
    return folder / f"{method.key}-{ratio:g}.json"
