"""Makes transformers know PPF's results (``ppf_llama``, ``ppf_qwen3``, …) wherever PPF is installed.

transformers has no plugins. PyTorch has: at the end of ``import torch`` it calls every entry point of the group
``torch.backends``, and ours is :func:`register`. It adds our names to transformers' table of model types when that
table is made, and serves the module the table then asks for; PPF itself is imported when a result is opened, and not
before. So ``lm_eval``, ``accelerate`` and others open PPF's results as they open any model.

Every process that imports torch runs this. So it is a package of its own that imports next to nothing, and it cannot
break anything: whatever goes wrong here, torch, transformers and all models that are not ours work as without us.
``PPF_AUTOLOAD=0`` turns it off, as ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` does for everybody's entry points; ``import
ppf`` then does the same.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress

_TABLES = "transformers.models.auto.auto_mappings", "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models."
# model_type of results → name of their configuration class; a test compares it with ppf.families.
_RESULTS = {
    "ppf_llama": "PPFLlamaConfig",
    "ppf_mistral": "PPFMistralConfig",
    "ppf_ministral3": "PPFMinistral3Config",
    "ppf_qwen2": "PPFQwen2Config",
    "ppf_qwen3": "PPFQwen3Config",
    "ppf_gemma2": "PPFGemma2Config",
    "ppf_gemma3_text": "PPFGemma3Config",
    "ppf_phi3": "PPFPhi3Config",
    "ppf_olmo2": "PPFOlmo2Config",
    "ppf_smollm3": "PPFSmolLM3Config",
    "ppf_granite": "PPFGraniteConfig",
    # Multimodal models around a result: see ppf.model.tower.
    "ppf_gemma3": "PPFGemma3WrapperConfig",
    "ppf_mistral3": "PPFMistral3WrapperConfig",
}


def register() -> None:
    """What torch calls: :func:`announce`, unless it is turned off; never raises."""
    with suppress(Exception):  # torch would not be imported; `import ppf` meets the same error and shows it
        if os.environ.get("PPF_AUTOLOAD") != "0":
            announce()


def announce() -> None:
    """Make all results known; a second call does nothing. Imports neither transformers nor PPF."""
    if not any(type(finder) is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _TABLES:
        if name in sys.modules:
            _add_results(sys.modules[name])


def add(model_type: str, config: str) -> None:
    """Make results of one more model type known, whose configuration class is named ``config``."""
    if _RESULTS.get(model_type) != config:
        _RESULTS[model_type] = config
        announce()


def _add_results(module) -> None:
    # A later transformers may keep its table elsewhere: then a test of ours fails, and nothing of theirs.
    names = vars(module).get("CONFIG_MAPPING_NAMES") if module is not None else None
    if hasattr(names, "setdefault"):
        for model_type, config in _RESULTS.items():
            names.setdefault(model_type, config)


class _Finder:
    """Finds the modules of results, and waits for the table. It is asked about every import of a process."""

    def find_spec(self, fullname, path=None, target=None):
        if not fullname.startswith(_MODELS):
            return None
        from importlib.machinery import ModuleSpec

        if fullname[len(_MODELS) :] in _RESULTS:
            return ModuleSpec(fullname, _Module(fullname[len(_MODELS) :]))
        return self._table(fullname, path, target) if fullname == _TABLES[0] else None

    def _table(self, fullname, path, target):
        """As the others find it, with a loader that adds to it."""
        for finder in list(sys.meta_path):
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Table(spec.loader)
                return spec
        return None


class _Table:
    """Loads the table as ever, then adds to it."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):  # for those who ask for its source, say
        return getattr(self.loader, name)

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        with suppress(Exception):  # a table of another kind: transformers works, and does not know our results
            _add_results(module)


class _Module:
    """The module that transformers imports for a result: PPF's classes, registered by being made."""

    def __init__(self, model_type):
        self.model_type = model_type

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        from ppf.model.tower import announced_classes

        module.__dict__.update({made.__name__: made for made in announced_classes(self.model_type).values()})
