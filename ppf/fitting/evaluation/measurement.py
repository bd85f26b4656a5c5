"""Measuring: a policy's log-perplexity from the store if it is there, else evaluated and stored."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from ...errors import PPFError
from ...model.policy import Policy
from ...timings import timed
from ..experience import Evaluation, Experience
from . import Evaluator


def measure(evaluator: Evaluator, experience: Experience, policy: Policy, round: int, source: str) -> float:
    """The log-perplexity of one policy; see :func:`measure_many`."""
    return measure_many(evaluator, experience, [policy], round, source)[0]


@timed("evaluating")
def measure_many(
    evaluator: Evaluator,
    experience: Experience,
    policies: Sequence[Policy],
    round: int,
    source: str | Sequence[str],
) -> list[float]:
    """The log-perplexities of ``policies``, in order; those the store lacks are evaluated a chunk at a time.

    ``source`` is one for all or one each. New rows are stored in the order of ``policies``, whatever was there before,
    so that a killed call, repeated, ends with the same rows. Raises ``PPFError`` at the first value that is not finite.
    """
    sources = [source] * len(policies) if isinstance(source, str) else list(source)
    known = {policy: experience.lookup(policy) for policy in policies}
    proposed = dict(zip(reversed(policies), reversed(sources), strict=True))  # of repeated policies, the first source
    missing = [policy for policy, value in known.items() if value is None]
    for start in range(0, len(missing), evaluator.chunk):
        chunk = missing[start : start + evaluator.chunk]
        began = time.perf_counter()
        values = evaluator.log_perplexities(chunk)
        seconds = (time.perf_counter() - began) / len(chunk)
        for policy, value in zip(chunk, values, strict=True):
            _require_finite(evaluator, policy, value)
            ratio = evaluator.grid.ratio(policy)
            experience.append(Evaluation(policy, value, ratio, round, proposed[policy], seconds))
            known[policy] = value
    return [known[policy] for policy in policies]


def _require_finite(evaluator: Evaluator, policy: Policy, value: float) -> None:
    if not math.isfinite(value):
        raise PPFError(
            f"the log-perplexity of {policy.to_json()} is {value}: activations overflow in {evaluator.decoder.dtype}. "
            "Convert the checkpoint to bfloat16 or float32"
        )
