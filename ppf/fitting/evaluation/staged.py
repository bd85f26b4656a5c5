"""Staged fidelity: many candidates on few tokens, the best of them on more, and so on; the rest is rejected early."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import InputError
from ...model.policy import Policy
from . import Evaluator

# Tokens and survivors of each stage, as in EvoPress (arXiv 2410.14649) and Týr; None is the whole text.
STAGES: tuple[tuple[int | None, int], ...] = ((2_048, 16), (16_384, 4), (None, 1))


def survivors(
    evaluator: Evaluator, policies: Sequence[Policy], stages: Sequence[tuple[int | None, int]] = STAGES
) -> list[tuple[Policy, float]]:
    """The policies that survive all ``stages`` with their log-perplexities on the last one's tokens, best first.

    Each stage measures on about ``tokens`` tokens of the text and keeps the given number of policies; ties go to the
    earlier policy. Stages that would measure on the tokens of the one before are not run twice. Raises ``InputError``
    for a stage that keeps nothing.
    """
    left, values, measured_on = list(dict.fromkeys(policies)), {}, None
    for tokens, keep in stages:
        if keep < 1:
            raise InputError("stages", keep, "keeps no policy", "Keep at least 1")
        count = evaluator.sequences_of(tokens)
        if count != measured_on:
            values = dict(zip(left, evaluator.log_perplexities(left, tokens), strict=True))
            measured_on = count
        left = sorted(left, key=values.__getitem__)[:keep]
    return [(policy, values[policy]) for policy in left]
