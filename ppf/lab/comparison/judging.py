"""What tasks say of a comparison's policies: every model is made in memory, judged, and its figures are kept.

OUTPUT/tasks/dense.json   the dense model's, and one file for every method at one ratio, named as its cell
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from transformers import PreTrainedModel

from ... import checkpoint
from ...fitting.calibration import LayerStatistics
from ...fitting.perplexity import computing
from ...fitting.session import Session
from ...fitting.tasks import Tasks
from ...model.policy import Policy
from ...progress import Progress, silent
from ...storage.sealed import Sealed
from .asis import AS_IS, as_is_model
from .methods import Method

Figures = dict[str, Any]


class _Answer(msgspec.Struct):
    """What was asked of one task, and the figures of it and of all that it is a group of."""

    asked: dict[str, Any]
    figures: dict[str, Figures]


class _Kept(msgspec.Struct):
    """A file: the policy that was judged, and the answers by the names of tasks."""

    policy: dict[str, Any]
    answers: dict[str, _Answer]


class Judge:
    """Judges the policies of a session's run by ``tasks``, and keeps what they say among ``files``.

    ``moments`` gives those of the run's statistics, in its ranking order, if a method ranks for itself. What was asked
    before, in the same way and of the same policy, is not asked again.
    """

    def __init__(
        self, session: Session, moments: Callable[[], Sequence[LayerStatistics]], tasks: Tasks, files: Sealed
    ):  # fmt: skip
        self.session, self.moments, self.tasks, self.files = session, moments, tasks, files
        self.tokenizer = checkpoint.load_tokenizer(session.run.model_path)

    def dense(self, progress: Progress = silent) -> Figures:
        """The dense model's figures."""
        policy = self.session.run.grid.dense()
        return self._figures("dense", policy, lambda: self.session.materialize(policy, refit=False), progress)

    def cells(self, cells: Sequence[dict[str, Any]], progress: Progress = silent) -> list[dict[str, Any]]:
        """``cells`` with the figures of each under "tasks"."""
        found = []
        progress("judge", 0, len(cells))
        for cell in cells:
            found.append(cell | {"tasks": self._cell(cell)})
            progress("judge", len(found), len(cells))
        return found

    def _cell(self, cell: dict[str, Any]) -> Figures:
        method, policy = Method(cell["method"], cell["evaluations_given"]), Policy.from_dict(cell["policy"])
        key = method.key(cell["requested_ratio"])
        if method.name in AS_IS:
            return self._figures(key, policy, lambda: as_is_model(self.session, method.name, self.moments(), policy))
        return self._figures(key, policy, lambda: self.session.materialize(policy))

    def _figures(
        self, key: str, policy: Policy, make: Callable[[], PreTrainedModel], progress: Progress = silent
    ) -> Figures:
        """Of all tasks; ``make`` gives the model if there is one that was not asked before. Raises ``InputError`` for a
        damaged file."""
        file, wanted = f"{key}.json", {name: self.tasks.asked(name) for name in self.tasks.found}
        kept = self._answers(file, policy)
        missing = [name for name, asked in wanted.items() if name not in kept or kept[name].asked != asked]
        model = computing(make()) if missing else None
        self.files.folder.mkdir(exist_ok=True)
        for name in missing:
            figures = self.tasks.only([name]).score(model, self.tokenizer, progress)
            kept[name] = _Answer(wanted[name], figures)
            self.files.write_json(file, msgspec.to_builtins(_Kept(policy.to_dict(), kept)))
        return {task: figures for name in wanted for task, figures in kept[name].figures.items()}

    def _answers(self, file: str, policy: Policy) -> dict[str, _Answer]:
        """What ``file`` says of ``policy``."""
        if not self.files.exists(file):
            return {}
        kept = self.files.read_json(file, _Kept)
        return kept.answers if kept.policy == policy.to_dict() else {}
