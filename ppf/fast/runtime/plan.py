"""What the runtime computes with: every layer's weights by what they do, of any model whose arithmetic it serves.

Nothing is copied. Layers may differ in their widths and lack either sub-layer; weights may be prefix views of wider
matrices (an elastic model's), as long as their last stride is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import PPFError
from ...families import KINDS, Family, families
from ...families.traits import rotations, traits_of, unserved
from ...model.classes import stock_classes
from ...model.decoder import Decoder
from ...model.views import Attention, FeedForward

SERVES = frozenset({"window", "head norm"})
"""The traits whose arithmetic the runtime knows, beside a plain Llama's and biases."""

# Rotary embeddings whose frequencies do not depend on the length of the sequence at hand.
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Layer:
    """One decoder layer; a sub-layer of width 0 is None. A token attends to ``window`` positions, itself among them."""

    attention: Attention | None
    ffn: FeedForward | None
    window: int | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole model. ``rotary(x, position_ids)`` gives cos and sin, each [1, T, d], in the dtype of x."""

    layers: tuple[Layer, ...]
    embedding: Tensor  # [V, H]
    norm: Tensor  # [H]
    head: Tensor  # [V, H]
    head_dim: int
    epsilon: float
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def groups(self) -> tuple[int, ...]:
        """kv-groups of every layer."""
        return tuple(0 if layer.attention is None else len(layer.attention.k) // self.head_dim for layer in self.layers)

    @property
    def query_heads(self) -> int:
        """The most query heads that a kv-group has."""
        return max(len(a.q) // len(a.k) for a in (layer.attention for layer in self.layers) if a is not None)

    def reach(self, positions: int) -> int:
        """The most positions of ``positions`` that a layer's attention reads for one token."""
        attended = [layer.window for layer in self.layers if layer.attention is not None]
        return max(min(positions, window or positions) for window in attended)

    def read_bytes(self) -> int:
        """Bytes of weights that one decode step reads: all layers, norms and the head."""
        tensors = [self.norm, self.head]
        for layer in self.layers:
            for part in (layer.attention, layer.ffn):
                tensors += [] if part is None else part.tensors()
        return sum(t.numel() * t.element_size() for t in tensors)


def plan_of(model: Any) -> Plan:
    """The weights that a model of a known family has now, by reference. Whether the runtime computes what the model
    does is another question: :func:`unsupported`."""
    decoder = Decoder.of_model(model)
    return Plan(
        layers=tuple(_layer(decoder, index, window) for index, window in enumerate(_windows(model.config))),
        embedding=model.get_input_embeddings().weight.detach(),
        norm=model.model.norm.weight.detach(),
        head=model.get_output_embeddings().weight.detach(),
        head_dim=decoder.structure.head_dim,
        epsilon=model.config.rms_norm_eps,
        rotary=model.model.rotary_emb,
    )


def layer_of(attention: Attention | None, ffn: FeedForward | None, window: int | None) -> Layer:
    """A layer of these tensors. Where only some of q, k and v have a bias, the others get one of zeros."""
    if attention is not None:
        biases = {"q_bias": attention.q, "k_bias": attention.k, "v_bias": attention.v}
        if any(getattr(attention, name) is not None for name in biases):
            missing = {n: w.new_zeros(len(w)) for n, w in biases.items() if getattr(attention, n) is None}
            attention = replace(attention, **missing)
    return Layer(attention, ffn, window)


def _layer(decoder: Decoder, index: int, window: int | None) -> Layer:
    widths = {kind: _width(decoder, index, kind) for kind in KINDS}
    attention = decoder.attention(index, widths["attention"]) if widths["attention"] else None
    ffn = decoder.ffn(index, widths["ffn"]) if widths["ffn"] else None
    return layer_of(attention, ffn, window)


def _width(decoder: Decoder, index: int, kind: str) -> int:
    """Units of a sub-layer now: an elastic model's are fewer than its configuration says."""
    output = decoder.layers[index].get(f"{decoder.family.parts[kind].output_name}.weight")
    return 0 if output is None else output.shape[1] // decoder.structure.of(kind)[index].columns


def _windows(config: Any) -> tuple[int | None, ...]:
    """Every layer's window. Where a family's configuration has types of layers, only those of the sliding type have it;
    one given to a family that does not know of types is ignored, as transformers does."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if any(field.name == "layer_types" for field in fields(config)):
        return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)
    return (window,) * config.num_hidden_layers


def unsupported(model: Any) -> str | None:
    """Why the runtime cannot serve ``model``, as the end of a sentence about it; None if it can."""
    config = model.config
    name = str(config.model_type).removeprefix("ppf_")
    family = next((family for family in families() if family.model_type == name), None)
    if family is None:
        return f"it is a {config.model_type}, which the runtime does not know"
    reason = _other_class(model, family) or unserved(traits_of(family, config), SERVES)
    if reason is not None:
        return reason
    kinds = [parameters.get("rope_type", "default") for parameters in rotations(config)]
    if unknown := [kind for kind in kinds if kind not in _FIXED_ROTARY]:
        return f"its rotary embedding ({unknown[0]}) is not one of {', '.join(_FIXED_ROTARY)}"
    return _other_modules(model, family) or _mixed(list(model.parameters()))


def _other_class(model: Any, family: Family) -> str | None:
    """Code of somebody else's under a known model type may compute anything."""
    try:
        known = stock_classes(family)["ForCausalLM"]
    except PPFError as error:
        return str(error)
    return None if isinstance(model, known) else f"it is a {type(model).__name__}, not a {known.__name__}"


def _other_modules(model: Any, family: Family) -> str | None:
    """Adapters and quantised layers compute what the runtime would not."""
    products, head = set(family.projections()), model.get_output_embeddings()
    for name, module in model.named_modules():
        is_product = module is head or name.rpartition(".")[2] in products
        if is_product and type(module) is not torch.nn.Linear:
            return f"{name} is a {type(module).__name__}"
    return None


def _mixed(parameters: list[Tensor]) -> str | None:
    if len({(p.device, p.dtype) for p in parameters}) > 1:
        return "its weights are on several devices or in several dtypes"
    if parameters[0].dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its weights are {parameters[0].dtype}"
    return None
