"""What a family is: one small declaration, as data, of where the prunable units of a decoder layer lie.

A family file says which classes of transformers it means and, for each kind of sub-layer, which tensors have rows that
are units, which projection has columns that are units, and what goes and what stays with them. Names, shapes, costs,
permutations, slices, configurations of results and exports follow from that, once, for all families. Nobody believes a
declaration: :func:`ppf.families.check` compares it, unit by unit, with transformers itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Part:
    """One kind of sub-layer. A unit is a kv-group of attention (one key/value head and its query heads), or a channel.

    ``rows``: projection → the roles of its rows, in order; more than one where a projection is fused. Of every unit,
    ``query`` has heads a group · head size rows, ``key`` and ``value`` head size, ``gate`` and ``up`` one; a
    projection's bias has the same rows as its weight. ``output`` is the projection whose columns are units (as many a
    unit as ``query`` or ``gate`` has rows); its bias belongs to no unit.
    """

    module: str
    rows: Mapping[str, tuple[str, ...]]
    output: str
    widths: Mapping[str, str]
    """Field of the configuration → what it counts: "units", or "heads" (query heads)."""
    before: str | None = None
    """The layer's norm of what the sub-layer reads; goes with the sub-layer."""
    after: str | None = None
    """The layer's norm of what the sub-layer gives; goes with the sub-layer."""
    head_norms: Mapping[str, str] = field(default_factory=dict)
    """Role → norm over every single head of it; belongs to no unit."""
    whole: bool = False
    """True if units cannot go one by one (a norm over all heads together): only all of them at once."""

    @property
    def norms(self) -> tuple[str, ...]:
        """Modules of the layer that go with the whole sub-layer."""
        return tuple(name for name in (self.before, self.after) if name)

    @property
    def projections(self) -> tuple[str, ...]:
        """All matrices of the sub-layer, inputs first, by their names in the layer."""
        return tuple(f"{self.module}.{name}" for name in (*self.rows, self.output))

    @property
    def output_name(self) -> str:
        return f"{self.module}.{self.output}"

    def owns(self, name: str) -> bool:
        """Whether a tensor of the layer, such as ``self_attn.q_proj.weight``, goes with this sub-layer."""
        return name.startswith((f"{self.module}.", *(f"{norm}." for norm in self.norms)))


ATTENTION = Part(
    module="self_attn",
    rows={"q_proj": ("query",), "k_proj": ("key",), "v_proj": ("value",)},
    output="o_proj",
    widths={"num_attention_heads": "heads", "num_key_value_heads": "units"},
    before="input_layernorm",
)
FFN = Part(
    module="mlp",
    rows={"gate_proj": ("gate",), "up_proj": ("up",)},
    output="down_proj",
    widths={"intermediate_size": "units"},
    before="post_attention_layernorm",
)

KINDS = "attention", "ffn"
"""The kinds of sub-layer, in the order in which a layer runs them."""


@dataclass(frozen=True, eq=False)
class Family:
    """A model type of transformers and what is special about it. ``classes`` is what its class names begin with."""

    model_type: str
    classes: str
    attention: Part = ATTENTION
    ffn: Part = FFN
    traits: frozenset[str] = frozenset()
    """What the arithmetic of every model of this family has beyond a plain Llama's; see :mod:`ppf.families.traits`."""
    begins: bool = False
    """True if the model has never seen a sequence without the begin token in front."""
    module: str = ""
    """Folder of the family in transformers, if that is not its model type."""
    text: str = ""
    """What stands before "Config" and "Model" in the class names of a text tower ("Text")."""
    towers: Mapping[str, str] = field(default_factory=dict)
    """Multimodal model types whose text tower is of this family → prefix of its tensors in place of "model."."""
    uniform: tuple[str, ...] = ()
    """Other model types that hold a uniform result where this family's own configuration refuses its head count."""

    @property
    def parts(self) -> dict[str, Part]:
        """The declaration of every kind of sub-layer, in the order in which a layer runs them."""
        return {"attention": self.attention, "ffn": self.ffn}

    @property
    def result_type(self) -> str:
        """``model_type`` of results whose layers differ."""
        return f"ppf_{self.model_type}"

    @property
    def width_fields(self) -> tuple[str, ...]:
        """The fields of the configuration that hold widths."""
        return tuple(name for part in self.parts.values() for name in part.widths)

    @property
    def modeling(self) -> str:
        """The module of transformers that holds the model's classes."""
        name = self.module or self.model_type
        return f"transformers.models.{name}.modeling_{name}"

    def class_name(self, kind: str) -> str:
        """Name in transformers of the "Config", "Model", "ForCausalLM" or "DecoderLayer" class."""
        return f"{self.classes}{self.text if kind in ('Config', 'Model') else ''}{kind}"

    def widths(self, config: Any) -> dict[str, tuple[int, int]]:
        """Of one layer's configuration: kind → (units, query heads a unit; 1 where there are none)."""
        return {kind: _widths(part, config) for kind, part in self.parts.items()}

    def fields(self, kind: str, units: int, heads: int) -> dict[str, int]:
        """The configuration fields of a sub-layer with ``units`` units of ``heads`` query heads each."""
        return {name: units * heads if counts == "heads" else units for name, counts in self.parts[kind].widths.items()}

    def projections(self) -> Iterator[str]:
        """The names that projections have inside their sub-layers, what a LoRA targets among them."""
        for part in self.parts.values():
            yield from (*part.rows, part.output)


def _widths(part: Part, config: Any) -> tuple[int, int]:
    found = {counts: getattr(config, name, None) for name, counts in part.widths.items()}
    heads = found.get("heads", found["units"])
    units = heads if found["units"] is None else found["units"]  # multi-head attention may leave kv heads out
    return units, heads // units if units else 1


def roles(parts: Iterable[Part]) -> frozenset[str]:
    """All roles that ``parts`` declare."""
    return frozenset(role for part in parts for segments in part.rows.values() for role in segments)
