"""What ``ppf.json`` must hold so that its summary can be shown: files of others may hold anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from ..storage.schemas import Count, Finite, Nonnegative, convert_to

# exp() of it is still a number.
_Log = Annotated[float, msgspec.Meta(ge=-700.0, le=700.0)]


class _Figure(msgspec.Struct):
    perplexity: Nonnegative


class _Predicted(msgspec.Struct):
    log_perplexity: _Log
    log_perplexity_std: _Log | None


class _Protocol(msgspec.Struct):
    text: str
    part: str
    tokens: Count
    sequence_length: Count
    read_as: dict[str, Any] | None = None


class _Measured(_Figure):
    dtype: str
    device: str
    protocol: _Protocol


class _Parameters(msgspec.Struct):
    dense: Count
    pruned: Count


class _Budget(msgspec.Struct):
    kind: str
    requested: Finite
    delivered: Finite
    predicted: Finite
    off: Finite | None
    within_tolerance: bool


class _Portable(_Figure):
    cost: Finite
    unrestricted: _Figure


class Result(msgspec.Struct):
    """Of ``ppf prune``."""

    measured: _Measured
    parameters: _Parameters
    predicted: _Predicted | None
    requested_ratio: Finite | None
    delivered_ratio: Finite
    search_evaluations: Count
    policy_from: str
    dense: _Figure | None
    portable: _Portable | None = None
    budget: _Budget | None = None


class _Settings(msgspec.Struct):
    method: str
    distillation: Finite


class _Corpus(msgspec.Struct):
    path: str
    training_tokens: Count


class _Recovery(msgspec.Struct):
    settings: _Settings
    tokens: Count
    steps: Count
    seconds: Nonnegative
    text: _Corpus
    teacher: str | None
    before: _Figure
    from_: str = msgspec.field(name="from")


class Recovered(msgspec.Struct):
    """Of ``ppf recover``."""

    recovery: _Recovery
    measured: _Measured
    dense: _Figure | None


def summary(report: dict[str, Any], path: Path) -> str | None:
    """The summary of what ``report``, the ``ppf.json`` of ``path``, says; None for one that measured nothing.

    Raises ``InputError`` for a report that does not hold what its command writes.
    """
    from .prune import summary as pruned
    from .recover import summary as recovered

    kind = next((name for name in ("recovery", "measured") if name in report), None)
    if kind is None:
        return None
    schema, told = (Recovered, recovered) if kind == "recovery" else (Result, pruned)
    convert_to(schema, "file", path / "ppf.json", report, "If it was edited, remove it: the checkpoint works without")
    return told(report, path)
