"""The reference forward: transformers' own decoder layers at any widths.

A sub-layer is run as the layer that has only it: what is absent contributes exactly zero. Nothing of the arithmetic is
ours, so nothing of it can be wrong here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig

from ..families import KINDS, Family
from .classes import plain_parts, stock_classes
from .geometry import head_dim_of
from .perlayer import LayerConfig, decoder_layer
from .structure import Structure

Hook = Callable[[str, Tensor], Tensor | None]
"""Called with the name of a module of the layer and its input [..., n]; may give what is to be added to its output."""


class Reference:
    """Runs layers of ``config``'s model with tensors given by name; the modules themselves hold none."""

    def __init__(self, family: Family, config: PreTrainedConfig, structure: Structure, attention: str = "sdpa"):
        self.family, self.config, self.structure = family, config, structure
        self.attention = attention
        self._modules: dict[tuple[int, tuple[int, ...]], nn.Module] = {}

    def __call__(
        self,
        index: int,
        widths: Mapping[str, int],
        tensors: Mapping[str, Tensor],
        hidden: Tensor,
        told: Mapping[str, Any],
        hook: Hook | None = None,
        watched: tuple[str, ...] = (),
    ) -> Tensor:
        """Layer ``index`` with ``widths`` units of every kind on ``hidden`` [B, T, H]; ``told`` is its entry of
        :meth:`ppf.model.frame.Frame.context`. Differentiable. ``hook`` sees the inputs of the modules ``watched``; what
        it returns, if anything, is added to their outputs."""
        module = self.module(index, widths)
        names = set(dict(module.named_parameters()))
        there = [name for name in watched if any(parameter.startswith(f"{name}.") for parameter in names)]
        handles = [module.get_submodule(name).register_forward_hook(partial(_pass, hook, name)) for name in there]
        try:
            wanted = {name: tensor for name, tensor in tensors.items() if name in names}
            result = functional_call(module, wanted, (hidden,), dict(told), strict=True)
        finally:
            for handle in handles:
                handle.remove()
        return result[0] if isinstance(result, tuple) else result

    def module(self, index: int, widths: Mapping[str, int]) -> nn.Module:
        """transformers' layer ``index`` with ``widths`` units of every kind, without memory for its weights."""
        key = index, tuple(widths[kind] for kind in KINDS)
        if key not in self._modules:
            self._modules[key] = self._make(index, widths)
        return self._modules[key]

    def _make(self, index: int, widths: Mapping[str, int]) -> nn.Module:
        own = {"head_dim": head_dim_of(self.config), "_attn_implementation": self.attention}
        for kind in KINDS:
            columns = self.structure.of(kind)[index].columns
            heads = columns // self.structure.head_dim if kind == "attention" else 1
            own |= self.family.fields(kind, widths[kind], heads)
        with torch.device("meta"):
            layer_class, parts = stock_classes(self.family)["DecoderLayer"], plain_parts(self.family)
            return decoder_layer(layer_class, _OneLayer(self.config, own), parts, index).eval()


class _OneLayer(LayerConfig):
    """A configuration all of whose layers have the same own widths."""

    @property
    def per_layer_config(self) -> dict[int, Any] | _OneLayer:
        return _Everywhere(self)


class _Everywhere:
    def __init__(self, config: Any):
        self._config = config

    def __getitem__(self, index: int) -> Any:
        return self._config


def _pass(hook: Hook, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    added = hook(name, inputs[0])
    return None if added is None else output + added
