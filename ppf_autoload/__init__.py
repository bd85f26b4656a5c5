"""Makes transformers know ``ppf_llama`` checkpoints wherever PPF is installed, without ``import ppf``.

transformers has no plugins. PyTorch has: at the end of ``import torch`` it calls every entry point of the group
``torch.backends``, and ours is :func:`register`. It adds one name to transformers' table of model types when that table
is made, and serves the module the table then asks for; PPF itself is imported when a ``ppf_llama`` checkpoint is
opened, and not before. So ``lm_eval``, ``accelerate`` and others open PPF's results as they open any model.

Only the standard library, and a package of its own: every process that imports torch runs this.
``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns it off; ``import ppf`` then does the same.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_MODEL_TYPE, _CONFIG = "ppf_llama", "PPFLlamaConfig"
_TABLES = "transformers.models.auto.auto_mappings", "transformers.models.auto.configuration_auto"
_MODULE = f"transformers.models.{_MODEL_TYPE}"


def register() -> None:
    """Announce ``ppf_llama``; a second call does nothing. Imports neither transformers nor PPF."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _TABLES:
        if name in sys.modules:
            _announce(sys.modules[name])


def _announce(module: ModuleType) -> None:
    # A later transformers may keep its table elsewhere: then `import ppf` is needed, and a test of ours fails.
    names = getattr(module, "CONFIG_MAPPING_NAMES", None)
    if names is not None:
        names.setdefault(_MODEL_TYPE, _CONFIG)


class _Finder(MetaPathFinder):
    """Finds the module of ``ppf_llama``, and waits for the table."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == _MODULE:
            return ModuleSpec(fullname, _Module())
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
    """The module that transformers imports for ``ppf_llama``: PPF's classes, registered by importing them."""

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        import ppf.model

        module.__dict__.update({name: getattr(ppf.model, name) for name in ppf.model.__all__})
