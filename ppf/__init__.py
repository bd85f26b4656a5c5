"""PPF: structural pruning of decoder language models.

    run = ppf.fit(model, text, output)                  # learns once how much every layer can lose
    answer = run.policy(ratio=0.3)                      # any size, in milliseconds
    model = ppf.Session(run).materialize(answer.policy) # a physically smaller Hugging Face model

Importing ppf announces the results' model types (``ppf_llama``, ``ppf_qwen3``, …) to transformers' Auto classes. It
loads neither torch nor transformers: names come from where they live when they are first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import ppf_autoload

from . import families
from .errors import InputError, PPFError

if TYPE_CHECKING:
    from .checkpoint import save
    from .deliver.elastic.loading import load
    from .deliver.recovery import RecoverySettings, recover
    from .fast.runtime import accelerate
    from .fitting.perplexity import evaluate
    from .fitting.run import Answer, Run, Settings
    from .fitting.selection import Selection
    from .fitting.session import Session
    from .fitting.stages import fit
    from .model.grid import Grid
    from .model.policy import Policy
    from .model.structure import Structure

__all__ = [
    "Answer",
    "Grid",
    "InputError",
    "PPFError",
    "Policy",
    "RecoverySettings",
    "Run",
    "Selection",
    "Session",
    "Settings",
    "Structure",
    "accelerate",
    "evaluate",
    "families",
    "fit",
    "load",
    "recover",
    "save",
]

_HOMES = {
    "Answer": "fitting.run",
    "Grid": "model.grid",
    "Policy": "model.policy",
    "RecoverySettings": "deliver.recovery",
    "Run": "fitting.run",
    "Selection": "fitting.selection",
    "Session": "fitting.session",
    "Settings": "fitting.run",
    "Structure": "model.structure",
    "accelerate": "fast.runtime",
    "evaluate": "fitting.perplexity",
    "fit": "fitting.stages",
    "load": "deliver.elastic.loading",
    "recover": "deliver.recovery",
    "save": "checkpoint",
}

ppf_autoload.register()


def __getattr__(name: str) -> Any:
    """Names of ``__all__``, and the classes of results, such as ``PPFQwen3ForCausalLM``."""
    home = _HOMES.get(name, "model.classes" if name.startswith("PPF") else None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
