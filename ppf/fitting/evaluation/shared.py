"""Evaluation by all of torchrun's processes: the first one runs the program, the others evaluate what it asks for.

Nothing is decided twice: proposals, training and files are the first process's alone, as if there were no other. Only
its evaluators know better: a list of policies is dealt out, every process evaluates its share, and the values come
back in order. A policy's value does not depend on those it is evaluated with, nor then on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ... import ranks
from ...errors import PPFError
from ...model.policy import Policy
from . import Evaluator

if TYPE_CHECKING:
    from ..session import Session

T = TypeVar("T")


@dataclass(frozen=True)
class _Make:
    """Make the evaluator ``number`` of one's own session, and forget those that are not ``kept``."""

    number: int
    kept: tuple[int, ...]
    dtype: torch.dtype | None
    refit: bool
    sequences: Tensor | None


@dataclass(frozen=True)
class _Evaluate:
    number: int
    policies: tuple[Policy, ...]
    tokens: int | None


@dataclass(frozen=True)
class _End:
    error: PPFError | None


class Shared(Evaluator):
    """The first process's evaluator, of which the others have one each."""

    def __init__(self, number: int, *parts: object):
        super().__init__(*parts)
        self._number = number
        _evaluators[number] = self

    @property
    def chunk(self) -> int:
        return super().chunk * ranks.world()

    def log_perplexities(self, policies: Sequence[Policy], tokens: int | None = None) -> list[float]:
        if _leading is None or len(policies) < 2:  # a single one is no work to share
            return super().log_perplexities(policies, tokens)
        asked = ranks.broadcast(_Evaluate(self._number, tuple(policies), tokens))
        return _answers(super().log_perplexities, self, asked)


_leading: Session | None = None
_count = 0
_evaluators: WeakValueDictionary[int, Shared] = WeakValueDictionary()


def led(session: Session, work: Callable[[], T]) -> T | None:
    """What ``work`` returns, called in the first process only; the others evaluate for it until it is done, and get
    None. All that is shared are the evaluators that ``work`` has from ``session``, of which every process has its own.

    A ``PPFError`` of ``work`` is raised in all processes.
    """
    global _leading
    if ranks.world() == 1:
        return work()
    if not ranks.first():
        return _serve(session)
    _leading = session
    try:
        result = work()
    except PPFError as error:
        with suppress(PPFError):  # it may be that the others have gone
            ranks.broadcast(_End(error))
        raise
    finally:
        _leading = None
    ranks.broadcast(_End(None))
    return result


def evaluator_class(
    session: Session, dtype: torch.dtype | None, refit: bool, sequences: Tensor | None
) -> Callable[..., Evaluator]:
    """What makes an evaluator of its weights, grid, sequences and library. If ``session`` is led, the others begin to
    make theirs, with the same arguments of :meth:`ppf.fitting.session.Session.evaluator`."""
    global _count
    if _leading is not session:
        return Evaluator
    _count += 1
    held = None if sequences is None else sequences.cpu()
    ranks.broadcast(_Make(_count, tuple(_evaluators), dtype, refit, held))
    return partial(Shared, _count)


def _serve(session: Session) -> None:
    """Evaluate for the first process until it ends."""
    made: dict[int, Evaluator] = {}
    while not isinstance(job := ranks.broadcast(None), _End):
        if isinstance(job, _Make):
            made = {number: made[number] for number in job.kept}
            made[job.number] = session.evaluator(job.dtype, job.refit, job.sequences)
        else:
            with suppress(PPFError):  # the first process raises it, and says so with its end
                _answers(made[job.number].log_perplexities, made[job.number], job)
    if job.error is not None:
        raise job.error


def _answers(evaluate: Callable, evaluator: Evaluator, asked: _Evaluate) -> list[float]:
    """The values of all policies, of which this process evaluates its share; a process's error is raised in all."""
    mine = ranks.share(_costs(evaluator, asked.policies))
    try:
        found = dict(zip(mine, evaluate([asked.policies[at] for at in mine], asked.tokens), strict=True))
    except PPFError as error:
        found = error
    parts = ranks.gather(found)
    if errors := [part for part in parts if isinstance(part, PPFError)]:
        raise errors[0]
    values = {at: value for part in parts for at, value in part.items()}
    return [values[at] for at in range(len(asked.policies))]


def _costs(evaluator: Evaluator, policies: Sequence[Policy]) -> list[float]:
    """Parameters that every token meets: those the policy keeps, and the head."""
    grid, head = evaluator.grid, evaluator.decoder.frame.head.numel()
    return (grid.kept(grid.encode(policies)).double() + head).tolist()
