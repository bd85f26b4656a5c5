"""Makes transformers know PPF's results (``ppf_llama``, ``ppf_qwen3``, …) wherever PPF is installed.

transformers has no plugins. PyTorch has: at the end of ``import torch`` it calls every entry point of the group
``torch.backends``, and ours is :func:`register`. It adds our names to transformers' table of model types when that
table is made, and serves the module the table then asks for; PPF itself is imported when a result is opened, and not
before. So ``lm_eval``, ``accelerate`` and others open PPF's results as they open any model.

Only the standard library, and a package of its own: every process that imports torch runs this.
``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns it off; ``import ppf`` then does the same.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

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
    """Announce all results; a second call does nothing. Imports neither transformers nor PPF."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _TABLES:
        if name in sys.modules:
            _announce(sys.modules[name])


def add(model_type: str, config: str) -> None:
    """Announce results of one more model type, whose configuration class is named ``config``."""
    if _RESULTS.get(model_type) != config:
        _RESULTS[model_type] = config
        register()


def _announce(module: ModuleType) -> None:
    # A later transformers may keep its table elsewhere: then a test of ours fails.
    names = getattr(module, "CONFIG_MAPPING_NAMES", None)
    if names is not None:
        for model_type, config in _RESULTS.items():
            names.setdefault(model_type, config)


class _Finder(MetaPathFinder):
    """Finds the modules of results, and waits for the table."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.startswith(_MODELS) and fullname.removeprefix(_MODELS) in _RESULTS:
            return ModuleSpec(fullname, _Module(fullname.removeprefix(_MODELS)))
        if fullname == _TABLES[0]:
            spec = PathFinder.find_spec(fullname, path)
            if spec is not None:
                spec.loader = _Table(spec.loader)
            return spec
        return None


class _Table(Loader):
    """Loads the table as ever, then adds to it."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _announce(module)


class _Module(Loader):
    """The module that transformers imports for a result: PPF's classes, registered by being made."""

    def __init__(self, model_type: str):
        self.model_type = model_type

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        from ppf.model.tower import announced_classes

        module.__dict__.update({made.__name__: made for made in announced_classes(self.model_type).values()})
