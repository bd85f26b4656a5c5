"""A model without its decoder layers: what goes into the first, what every layer is told, and what follows the last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..families import Family
from ..families.traits import logit_cap, logit_scale
from .build import TIED, build
from .geometry import head_dim_of
from .perlayer import without_layers


class Frame:
    """The embedding, masks, rotary embeddings, last norm and head of ``config``'s model, all of them transformers' own.

    ``outer`` are the tensors outside the layers under their full names, taken over without a copy.
    """

    def __init__(self, family: Family, config: PreTrainedConfig, outer: Mapping[str, Tensor]):
        shell = without_layers(config)
        shell.head_dim = head_dim_of(config)
        dtype = outer[TIED[1]].dtype
        self.model = build(_stock(shell, family), outer, dtype).requires_grad_(False)
        self.layers = config.num_hidden_layers
        self.model.config.num_hidden_layers = self.layers
        self._recorders = nn.ModuleList(_Recorder() for _ in range(self.layers))
        self.model.model.layers = self._recorders
        self._known: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self.cap, self.scale = logit_cap(config), logit_scale(config)

    @property
    def head(self) -> Tensor:
        """[vocabulary, hidden]."""
        return self.model.get_output_embeddings().weight.detach()

    @property
    def norm(self) -> nn.Module:
        """The last norm."""
        return self.model.model.norm

    @property
    def attention(self) -> str:
        """transformers' name of the way attention is computed."""
        return self.model.config._attn_implementation

    @torch.no_grad()
    def begin(self, tokens: Tensor) -> Tensor:
        """What the first layer reads, [B, T, hidden], of int64 ``tokens`` [B, T]; the caller's own."""
        self._run(tokens)
        return self._recorders[0].hidden.clone()

    @torch.no_grad()
    def context(self, batch: int, length: int) -> list[dict[str, Any]]:
        """What every layer is told beside its input for ``batch`` sequences of ``length`` tokens: masks, positions and
        their rotary embeddings, as keyword arguments."""
        if (batch, length) not in self._known:
            self._run(torch.zeros(batch, length, dtype=torch.int64, device=self.head.device))
            told = [dict(recorder.arguments) for recorder in self._recorders]
            # Masks are as large as a batch's scores; those of one shape are all that a pass over a text needs.
            self._known = {(batch, length): told}
        return self._known[batch, length]

    def _run(self, tokens: Tensor) -> None:
        self.model.model(input_ids=tokens, use_cache=False)


class _Recorder(nn.Module):
    """In the place of a layer: keeps what it is given, and passes its input on."""

    def forward(self, hidden_states: Tensor, *_: Any, **arguments: Any) -> Tensor:
        self.hidden, self.arguments = hidden_states, arguments
        return hidden_states


def _stock(shell: PreTrainedConfig, family: Family) -> PreTrainedConfig:
    """``shell`` under the family's own class, whatever result it may be of."""
    if shell.model_type == family.model_type:
        return shell
    from .classes import stock_classes

    stock = object.__new__(stock_classes(family)["Config"])
    stock.__dict__.update(shell.__dict__)
    return stock
