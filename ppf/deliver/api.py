"""What Python callers hold: a run that prunes and evaluates, and the result of pruning before it is written.

run = ppf.fit("MODEL", "calibration.txt", "RUN", evaluations=600)
small = run.prune(ratio=0.3, search=150)
small.save_pretrained("OUT")
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import checkpoint, ranks
from ..errors import InputError
from ..fitting import run as fitted
from ..fitting import stages
from ..fitting.evaluation.shared import led
from ..fitting.perplexity import require_sequences
from ..fitting.reader import Reader
from ..fitting.run import Answer
from ..fitting.session import Session
from ..fitting.tasks import Tasks
from ..model.policy import Policy
from ..model.stream import Placement
from ..progress import Progress, logged, silent, tell
from ..storage.locks import locked_folder, sweep, waiting
from ..text import Text
from .portable import choose_portable
from .request import Request
from .results import Choice, check_refit, choose_for, deliver, read_policy

T = TypeVar("T")


class Run(fitted.Run):
    """A finished fit: asks its agent for policies, measures and prunes.

    The model's weights are read when first needed and kept for what comes next, on the device asked for last. Under
    torchrun, after :func:`ppf.ranks.start`, all processes make the same calls and get the same answers.
    """

    def __init__(self, path: str | Path):
        """Open the folder that ``ppf.fit`` or ``ppf fit`` made. Raises ``InputError`` if it is none."""
        super().__init__(path)
        self._kept: tuple[tuple[torch.device, Placement], Session] | None = None

    def policy(
        self, ratio: float | None = None, *, weights_gb: float | None = None, memory_gb: float | None = None,
        flops: float | None = None, latency_ms: float | None = None, tokens_per_second: float | None = None,
        context: int = 2048,
    ) -> Answer:  # fmt: skip
        """The run's policy for a size, with the predictor's opinion of it, in milliseconds; no weights are read.

        Give exactly one size, as for :meth:`prune`. Raises ``InputError`` for one that the model cannot have, and while
        the fit is unfinished.
        """
        request = Request(ratio, _weights(weights_gb, memory_gb), flops, latency_ms, tokens_per_second, context)
        return self.answer(request.budget(self))

    def prune(
        self,
        ratio: float | None = None,
        *,
        weights_gb: float | None = None,
        memory_gb: float | None = None,
        flops: float | None = None,
        latency_ms: float | None = None,
        tokens_per_second: float | None = None,
        context: int = 2048,
        policy: Policy | Mapping[str, Any] | str | Path | None = None,
        search: int | None = None,
        portable: bool = False,
        refit: str = "fast",
        device: str | torch.device = "auto",
        placement: Placement | None = None,
        progress: Progress = silent,
        wait: bool = False,
    ) -> Pruned:
        """The run's policy for a size, or the best of ``search`` true evaluations, ready to be written or used.

        Give exactly one size: ``ratio`` is the share of the decoder's parameters to remove; ``weights_gb`` (on the
        command line ``--memory-gb``; both names serve) 10⁹ bytes of all weights; ``flops`` operations a token that
        attends to ``context`` others; ``latency_ms`` and ``tokens_per_second`` by the run's profile. Or a ``policy``:
        itself, its dict, or a JSON file with one. ``portable`` asks for one that every export accepts. ``refit``
        "thorough" trains all kept weights towards the dense model's states, after the least squares of "fast": minutes
        on a GPU. Raises
        ``InputError`` for what cannot be had, before any weight is read; and for evaluations, which are kept in the
        run, while another process writes there, unless that is to ``wait``.
        """
        session = self.session(device, placement)
        request = Request(ratio, _weights(weights_gb, memory_gb), flops, latency_ms, tokens_per_second, context)
        work = partial(decide, session, request, search, policy, portable, refit, logged(progress))
        with waiting(wait):
            choice = ranks.from_first(work) if search is None else _shared(session, work)
        self.grid.check(choice.policy)
        tell("%s: policy from %s, %.1f %% removed", self.path, choice.origin, 100 * self.grid.ratio(choice.policy))
        return Pruned(session, choice)

    @overload
    def evaluate(self, policy: Policy, text: Any = None, **where: Any) -> dict[str, float]: ...
    @overload
    def evaluate(self, policy: Sequence[Policy], text: Any = None, **where: Any) -> list[dict[str, float]]: ...
    def evaluate(
        self,
        policy: Policy | Sequence[Policy],
        text: Any = None,
        *,
        refit: bool = True,
        device: str | torch.device = "auto",
        placement: Placement | None = None,
    ) -> dict[str, float] | list[dict[str, float]]:
        """True perplexity of a policy, or of each of several at once, without surgery: "perplexity", "log_perplexity"
        (nats a token) and "ratio" (the share of the decoder's parameters that it removes).

        Measured on the run's evaluation split, or on ``text``: anything that :class:`ppf.Text` takes, or token
        sequences int64 [N, T]. Several policies share what they have in common: much faster than one by one. ``refit``
        False leaves the output projections as they were. Raises ``InputError`` for a policy off the grid and a text
        that cannot be read.
        """
        policies = [policy] if isinstance(policy, Policy) else list(policy)
        for asked in policies:
            self.grid.check(asked)
        session, sequences = self.session(device, placement), self._sequences(text)

        def measure() -> list[float]:
            return session.evaluator(refit=refit, sequences=sequences).log_perplexities(policies)

        values = _shared(session, measure)
        found = [
            {"perplexity": math.exp(value), "log_perplexity": value, "ratio": self.grid.ratio(asked)}
            for asked, value in zip(policies, values, strict=True)
        ]
        return found[0] if isinstance(policy, Policy) else found

    def session(self, device: str | torch.device = "auto", placement: Placement | None = None) -> Session:
        """The run with its model's weights, which are kept until another device or placement is asked for."""
        wanted = checkpoint.resolve_device(device), placement or Placement()
        if self._kept is None or self._kept[0] != wanted:
            self._kept = None  # before others come
            # Of a run of its own: in a cycle with this one, weights would stay until Python looks for cycles.
            self._kept = wanted, Session(fitted.Run(self.path), wanted[0], placement=wanted[1])
        return self._kept[1]

    def release(self) -> None:
        """Let go of the weights."""
        self._kept = None

    def _sequences(self, text: Any) -> Tensor | None:
        """A pipe can be read once: the first of several processes reads."""
        if text is None:
            return None
        given = Text.of(text).given
        if isinstance(given, Tensor) and given.dim() == 2:  # of any length
            require_sequences(given)
            return given.long()
        length = self.settings.sequence_length
        return ranks.from_first(lambda: Reader.of(self.model_path, length).sequences(text))


class Pruned:
    """A policy of a run that has been chosen, by :meth:`Run.prune`; its model is not made yet."""

    def __init__(self, session: Session, choice: Choice):
        self._session, self._choice = session, choice

    @property
    def policy(self) -> Policy:
        """How many units every layer keeps."""
        return self._choice.policy

    @property
    def ratio(self) -> float:
        """The share of the decoder's parameters that is removed."""
        return self._session.run.grid.ratio(self.policy)

    @property
    def policy_from(self) -> str:
        """Whose it is: "agent", "calibration", "measured" or "uniform", whichever :meth:`policy` says; "search",
        "portable", or "given" by the caller."""
        return self._choice.origin

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The dense model's, which the result keeps."""
        return checkpoint.load_tokenizer(self._session.run.model_path)

    def materialize(self) -> PreTrainedModel:
        """A new transformers model in memory, in the checkpoint's dtype, each time. It is the caller's own: what
        training makes of it is saved by its own ``save_pretrained``, not by :meth:`save_pretrained` here."""
        return self._session.materialize(self.policy, thorough=self._choice.refit == "thorough")

    def save_pretrained(
        self, output: str | Path, *, tasks: Tasks | Sequence[str] | str | None = None, force: bool = False,
        progress: Progress = silent, wait: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Write the checkpoint, as ``ppf prune`` does: weights, tokenizer, generation config and ``ppf.json``.

        Layer by layer, so that the result never need fit in memory; what was written is opened again and scored on the
        run's evaluation split, and judged by lm_eval's ``tasks`` if there are any. Returns what ``ppf.json`` holds. All
        or nothing; raises ``InputError`` if ``output`` exists and is not empty, unless ``force``: then it is replaced
        once the new one is complete. One that holds exactly this already is left as it is, with a warning. Raises
        ``InputError`` while another process writes ``output``, too, unless that is to ``wait``.
        """
        judged = tasks if tasks is None or isinstance(tasks, Tasks) else Tasks.open(tasks)
        work = partial(deliver, self._session, self._choice, output, force, logged(progress), judged)
        with waiting(wait):
            report = ranks.from_first(work)
        tell("%s: written, perplexity %.2f", output, report["measured"]["perplexity"])
        return report

    def __repr__(self) -> str:
        return f"<Pruned: {self.ratio:.1%} of {self._session.run.path} removed, policy from {self.policy_from}>"


@functools.wraps(stages.fit)
def fit(*args: Any, progress: Progress = silent, **named: Any) -> Run:
    run = Run(stages.fit(*args, progress=logged(progress), **named).path)
    tell("%s: complete", run.path)
    return run


def decide(
    session: Session, request: Request, search: int | None, policy: Policy | Mapping[str, Any] | str | Path | None,
    portable: bool, refit: str = "fast", progress: Progress = silent,
) -> Choice:  # fmt: skip
    """The policy that is asked for: ``policy`` (itself, its dict, or its file), or one of the size in ``request``.

    Raises ``InputError`` for what does not go together or cannot be had.
    """
    check_refit(refit)
    return replace(_chosen(session, request, search, policy, portable, progress), refit=refit)


def _chosen(
    session: Session, request: Request, search: int | None, policy: Policy | Mapping[str, Any] | str | Path | None,
    portable: bool, progress: Progress,
) -> Choice:  # fmt: skip
    if policy is not None:
        for name, value in (*request.given.items(), ("search", search), ("portable", portable or None)):
            if value is not None:
                raise InputError(name, value, "makes no sense with --policy, which decides everything", "Drop one")
        return Choice(_given(policy), "given")
    budget = request.budget(session.run)
    if not portable or session.run.settings.portable:
        with nullcontext() if search is None else _measuring(session):
            return choose_for(session, budget, search, progress)
    other = None if budget.requested_ratio is not None else budget.requested
    for name, value in (("search", search), (budget.name, other)):
        if value is not None:
            remedy = "Fit the model with --portable and prune that run, or give --ratio alone"
            raise InputError(name, value, "is not possible with --portable in a run that is not", remedy)
    with _measuring(session):
        return choose_portable(session, budget.requested)


@contextmanager
def _measuring(session: Session) -> Iterator[None]:
    """Alone with the run, whose experience grows, and is one file again in the end."""
    with locked_folder(session.run.path, "run"):
        sweep(session.run.path)
        try:
            yield
        finally:
            session.run.experience.close()


def _given(policy: Policy | Mapping[str, Any] | str | Path) -> Policy:
    if isinstance(policy, Policy):
        return policy
    return Policy.from_dict(dict(policy)) if isinstance(policy, Mapping) else read_policy(policy)


def _weights(weights_gb: float | None, memory_gb: float | None) -> float | None:
    """What is asked for under either name."""
    if weights_gb is not None and memory_gb is not None:
        raise InputError("weights_gb", weights_gb, "is another name for memory_gb, which is given too", "Drop one")
    return memory_gb if weights_gb is None else weights_gb


def _shared(session: Session, work: Callable[[], T]) -> T:
    """What ``work`` returns in the first process, in all of them; the others evaluate for it meanwhile."""
    return ranks.broadcast(led(session, work))
