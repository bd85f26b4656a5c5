"""The prunable geometry of a Llama. The only place that knows Llama's shapes and what a unit costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Structure:
    """L layers, each with G kv-groups (one key/value head and its g query heads) and C FFN channels.

    A unit is what is removed: one kv-group or one FFN channel. Costs count the seven projection matrices of a decoder
    layer; the two norm vectors (0.02 % of a layer) belong to no unit and are left out of every ratio.
    """

    layers: int
    hidden: int
    kv_groups: int
    heads_per_group: int
    head_dim: int
    channels: int

    @classmethod
    def from_config(cls, config: Any) -> Structure:
        """Read the geometry off a transformers ``LlamaConfig`` (or anything with the same attribute names)."""
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            kv_groups=kv_heads,
            heads_per_group=heads // kv_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            channels=config.intermediate_size,
        )

    @property
    def group_rows(self) -> int:
        """Rows of q_proj (= columns of o_proj) that belong to one kv-group: g · head_dim."""
        return self.heads_per_group * self.head_dim

    @property
    def kv_group_cost(self) -> int:
        """Parameters of one kv-group: g·d rows of q, d of k, d of v, g·d columns of o = (2g+2)·d·hidden."""
        return (2 * self.heads_per_group + 2) * self.head_dim * self.hidden

    @property
    def channel_cost(self) -> int:
        """Parameters of one FFN channel: a row of gate, a row of up, a column of down = 3·hidden."""
        return 3 * self.hidden

    @property
    def decoder_parameters(self) -> int:
        """Parameters of all units of all layers: the denominator of every ratio."""
        return self.layers * (self.kv_groups * self.kv_group_cost + self.channels * self.channel_cost)

    def to_dict(self) -> dict[str, int]:
        return asdict(self)
