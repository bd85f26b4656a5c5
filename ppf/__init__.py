"""PPF: structural pruning of decoder language models.

    run = ppf.fit(model, text, "RUN", evaluations=600)  # learns once how much every layer can lose
    answer = run.policy(ratio=0.3)                      # any size, in milliseconds
    small = run.prune(ratio=0.3, search=150)            # the best of that size that 150 evaluations find
    small.save_pretrained("OUT")                        # a physically smaller Hugging Face model, tokenizer and report

Nothing is printed. ``logging.getLogger("ppf")`` is told when a stage begins and ends, at level INFO; what takes long
takes ``progress=``, which is called as ``progress(stage, done, total)``. ``device`` is "auto" everywhere: CUDA if there
is any, else the CPU.

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
    from .deliver.api import Pruned, Run, fit
    from .deliver.elastic.loading import load
    from .deliver.recovery import ElasticSettings, RecoverySettings, recover, recover_elastic
    from .fast.runtime import accelerate
    from .fitting.perplexity import evaluate
    from .fitting.run import Answer, Settings
    from .fitting.selection import Selection
    from .fitting.session import Session
    from .fitting.tasks import Tasks
    from .model.grid import Grid
    from .model.policy import Policy
    from .model.stream import Placement
    from .model.structure import Structure
    from .text import Text

__all__ = [
    "Answer",
    "ElasticSettings",
    "Grid",
    "InputError",
    "PPFError",
    "Placement",
    "Policy",
    "Pruned",
    "RecoverySettings",
    "Run",
    "Selection",
    "Session",
    "Settings",
    "Structure",
    "Tasks",
    "Text",
    "accelerate",
    "evaluate",
    "families",
    "fit",
    "load",
    "recover",
    "recover_elastic",
    "save",
]

_HOMES = {
    "Answer": "fitting.run",
    "ElasticSettings": "deliver.recovery",
    "Grid": "model.grid",
    "Placement": "model.stream",
    "Policy": "model.policy",
    "Pruned": "deliver.api",
    "RecoverySettings": "deliver.recovery",
    "Run": "deliver.api",
    "Selection": "fitting.selection",
    "Session": "fitting.session",
    "Settings": "fitting.run",
    "Structure": "model.structure",
    "Tasks": "fitting.tasks",
    "Text": "text",
    "accelerate": "fast.runtime",
    "evaluate": "fitting.perplexity",
    "fit": "deliver.api",
    "load": "deliver.elastic.loading",
    "recover": "deliver.recovery",
    "recover_elastic": "deliver.recovery",
    "save": "checkpoint",
}

ppf_autoload.announce()


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
