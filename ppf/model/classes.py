"""The transformers classes of a family: its own, and those of results whose layers differ; registered when needed."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import Any

from ..families import Family, family_of
from ..families.base import Part

_HOME = __name__


@cache
def stock_classes(family: Family) -> dict[str, type]:
    """transformers' "Config", "Model", "ForCausalLM" and "DecoderLayer" of a family. Raises ``PPFError`` if the
    installed transformers has them not."""
    from ..errors import PPFError

    try:
        module = importlib.import_module(family.modeling)
        return {
            kind: getattr(module, family.class_name(kind))
            for kind in ("Config", "Model", "ForCausalLM", "DecoderLayer")
        }
    except (ImportError, AttributeError) as error:
        raise PPFError(f"the installed transformers has no {family.model_type} as PPF knows it ({error})") from error


@cache
def result_classes(family: Family) -> dict[str, type]:
    """The "Config", "Model" and "ForCausalLM" of results whose layers differ, known to the Auto classes from now on."""
    from .perlayer import make_classes

    made = make_classes(f"PPF{family.classes}", family.result_type, stock_classes(family), plain_parts(family), _HOME)
    _announce(family, made)
    return made


def announce(family: Family) -> None:
    """Make the Auto classes and pickles open results of ``family`` as its own, after another declaration of its model
    type."""
    made = result_classes(family)
    for one in made.values():
        setattr(sys.modules[_HOME], one.__name__, one)
    _announce(family, made)


def _announce(family: Family, made: dict[str, type]) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    AutoConfig.register(family.result_type, made["Config"], exist_ok=True)
    AutoModel.register(made["Config"], made["Model"], exist_ok=True)
    AutoModelForCausalLM.register(made["Config"], made["ForCausalLM"], exist_ok=True)


def classes_of(model_type: str) -> dict[str, type]:
    """The "Config", "Model" and "ForCausalLM" of a model type, stock or PPF's. Raises ``InputError`` for others."""
    family = family_of(model_type)
    return result_classes(family) if model_type == family.result_type else stock_classes(family)


def plain_parts(family: Family) -> tuple[dict[str, Any], ...]:
    """What :mod:`ppf.model.perlayer` needs to know of a family, as plain data."""
    return tuple(_plain(part, kind) for kind, part in family.parts.items())


def _plain(part: Part, kind: str) -> dict[str, Any]:
    # transformers' attention gives its output and its weights, its FFN only the output.
    results = 2 if kind == "attention" else 1
    return {"module": part.module, "norms": part.norms, "fields": tuple(part.widths), "results": results}


def __getattr__(name: str) -> type:
    """Classes of results by name, such as ``PPFQwen3ForCausalLM``: made when first asked for, pickles among others."""
    from ..families import families

    for family in families():
        for kind in ("Config", "Model", "ForCausalLM"):
            if name == f"PPF{family.classes}{kind}":
                return result_classes(family)[kind]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
