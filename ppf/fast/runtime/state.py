"""What a model's runtime knows from call to call, and whether that is still true of the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .engine import Engine
from .plan import Plan, plan_of, unsupported

STATE = "_ppf_runtime"
"""Where a model keeps its :class:`RuntimeState`."""


class RuntimeState:
    """A model's plan and engine, remade when its modules or weights are others; ``told`` are the warnings given."""

    def __init__(self) -> None:
        self.told: set[str] = set()
        self.plan: Plan | None = None
        self.engine: Engine | None = None
        self._snapshot: _Snapshot | None = None
        self._reason: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model starts with a runtime of its own: graphs hold the original's addresses."""
        return RuntimeState, ()

    def obstacle(self, model: Any) -> str | None:
        """Why the runtime cannot serve ``model`` as it is now; None if it can, and then plan and engine are up to date.

        Follows ``model.to(...)``, ``load_state_dict(assign=True)``, adapters, hooks and the like.
        """
        if self._snapshot is None or not self._snapshot.holds():
            self._snapshot = _Snapshot(model)
            self._reason = unsupported(model)
            if self._reason is None:
                self.renew(model)
        if self._reason is None and model.training and getattr(model.config, "attention_dropout", 0.0):
            return "the model is in training mode"
        return self._reason or hooked(self._snapshot.modules)

    def renew(self, model: Any) -> None:
        """Plan and engine for the weights that ``model`` has now."""
        self.plan = plan_of(model)
        self.engine = Engine(self.plan)


class _Snapshot:
    """Modules, their children, and the addresses of their weights; compared at every call, so as plain as can be."""

    def __init__(self, model: Any):
        self.modules = list(model.modules())
        self._children = [list(module._modules.values()) for module in self.modules]
        self._owners = [module._parameters for module in self.modules if module._parameters]
        self._weights = self._now()

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        children = zip(self.modules, self._children, strict=True)
        return self._now() == self._weights and all(list(m._modules.values()) == kept for m, kept in children)

    def _now(self) -> list[tuple[int, torch.dtype]]:
        weights = (p for owner in self._owners for p in owner.values() if p is not None)
        return [(p.data_ptr(), p.dtype) for p in weights]


def runtime_of(model: Any) -> RuntimeState:
    """The runtime of ``model``, made at the first call."""
    if STATE not in model.__dict__:
        model.__dict__[STATE] = RuntimeState()
    return model.__dict__[STATE]


def hooked(modules: Iterable[torch.nn.Module]) -> str | None:
    """The runtime calls no modules, so nobody would call their hooks."""
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a {type(module).__name__} has forward hooks"
    return None
