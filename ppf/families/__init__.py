"""Families: what PPF knows of every model type, one small file each; and how to add one.

    ppf.families.register(ppf.families.Family("mymodel", "MyModel"))
    ppf.families.check("mymodel")

docs/families.md has a worked example. Importing this package needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import InputError
from .base import ATTENTION, FFN, KINDS, Family, Part
from .gemma2 import GEMMA2
from .gemma3 import GEMMA3
from .granite import GRANITE
from .llama import LLAMA
from .ministral3 import MINISTRAL3
from .mistral import MISTRAL
from .olmo2 import OLMO2
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .smollm3 import SMOLLM3

_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make ``family`` known under its model type; results of it are found by transformers' Auto classes.

    A family of the same model type is replaced. Check a new one with :func:`check`.
    """
    _FAMILIES[family.model_type] = family
    import ppf_autoload

    ppf_autoload.add(family.result_type, f"PPF{family.classes}Config")


@contextmanager
def registered(family: Family) -> Iterator[None]:
    """``family`` is the one of its model type within the block."""
    before = _FAMILIES.get(family.model_type)
    register(family)
    try:
        yield
    finally:
        del _FAMILIES[family.model_type]
        if before is not None:
            register(before)


def family_of(model_type: Any, file: Any = "model_type") -> Family:
    """The family of a model type, or of the results of it (``ppf_…``).

    Raises ``InputError`` about ``file`` for one that is not registered, with the list and the way to add one.
    """
    name = model_type.removeprefix("ppf_") if isinstance(model_type, str) else model_type
    if not isinstance(name, str) or name not in _FAMILIES:
        problem = f"PPF does not know this model type ({file})"
        remedy = f"Known: {', '.join(sorted(_FAMILIES))}. To add one, see ppf.families.register and docs/families.md"
        raise InputError("model_type", model_type, problem, remedy)
    return _FAMILIES[name]


def families() -> tuple[Family, ...]:
    """All registered families, in the order of registration."""
    return tuple(_FAMILIES.values())


def tower_of(model_type: Any) -> tuple[Family, str] | None:
    """The family of a multimodal model type's text tower and the prefix of its tensors, or None."""
    found = ((f, f.towers[model_type]) for f in families() if isinstance(model_type, str) and model_type in f.towers)
    return next(found, None)


def check(model_type: str, **options: Any) -> int:
    """Compare a family's declaration with transformers, unit by unit; the number of removals tried.

    See :func:`ppf.fitting.family_check.check`, which takes the options.
    """
    from ..fitting.family_check import check as compare  # the one look upwards: this is where people look for it

    return compare(family_of(model_type), **options)


for _family in (
    LLAMA, MISTRAL, MINISTRAL3, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OLMO2, SMOLLM3, GRANITE,
):  # fmt: skip
    register(_family)

__all__ = [
    "ATTENTION",
    "FFN",
    "KINDS",
    "Family",
    "Part",
    "check",
    "families",
    "family_of",
    "register",
    "registered",
    "tower_of",
]
