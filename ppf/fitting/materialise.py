"""Surgery: a policy becomes a physically smaller model, on the device the dense weights are on.

Rows of q, k, v, gate and up are gathered in one batch for the whole model; o and down come from the library, refitted
to the kept units (or are gathered too, where there is none).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from ..fast.ops.gather import gather_many
from ..model import build, pruned_config
from ..model.grid import Grid
from ..model.policy import Policy
from ..model.weights import DecoderWeights, LayerRanking, expand_units
from .library import Library


def materialize(
    config: LlamaConfig,
    weights: DecoderWeights,
    ranking: Sequence[LayerRanking],
    grid: Grid,
    policy: Policy,
    library: Library | None = None,
) -> PreTrainedModel:
    """The pruned model, in the dtype and on the device of ``weights`` (dense, in checkpoint order).

    A uniform policy gives a plain ``LlamaForCausalLM`` or ``MistralForCausalLM``, any other a ``PPFLlamaForCausalLM``.
    Raises ``InputError`` for a policy off the grid.
    """
    grid.check(policy)
    names, jobs = _jobs(weights, ranking, grid, policy, with_outputs=library is None)
    state = dict(zip(names, gather_many(jobs), strict=True))
    if library is not None:
        state |= _refitted(grid, policy, library, weights)
    state |= _unpruned(config, weights, policy)
    return build(pruned_config(config, policy), state, dtype=weights.dtype)


def _jobs(
    weights: DecoderWeights, ranking: Sequence[LayerRanking], grid: Grid, policy: Policy, with_outputs: bool
) -> tuple[list[str], list[tuple[Tensor, Tensor, int]]]:
    """Names and gathers (matrix, kept indices, dim) of all projections that a policy keeps."""
    s, names, jobs = grid.structure, [], []

    def keep(name: str, matrix: Tensor, index: Tensor, dim: int = 0) -> None:
        names.append(name)
        jobs.append((matrix, index, dim))

    for index, (layer, order) in enumerate(zip(weights.layers, ranking, strict=True)):
        groups, channels = order.attention[: policy.attention[index]], order.ffn[: policy.ffn[index]]
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        if len(groups):
            query, key = expand_units(groups, s.group_rows), expand_units(groups, s.head_dim)
            keep(f"{attention}.q_proj.weight", layer.q, query)
            keep(f"{attention}.k_proj.weight", layer.k, key)
            keep(f"{attention}.v_proj.weight", layer.v, key)
            if with_outputs:
                keep(f"{attention}.o_proj.weight", layer.o, query, 1)
        if len(channels):
            keep(f"{mlp}.gate_proj.weight", layer.gate, channels)
            keep(f"{mlp}.up_proj.weight", layer.up, channels)
            if with_outputs:
                keep(f"{mlp}.down_proj.weight", layer.down, channels, 1)
    return names, jobs


def _refitted(grid: Grid, policy: Policy, library: Library, weights: DecoderWeights) -> dict[str, Tensor]:
    """Refitted o and down of the sub-layers that stay, copied so that the model owns its weights."""
    layers, state = grid.structure.layers, {}
    for sublayer, level in enumerate(grid.encode([policy])[0].tolist()):
        if level:
            name = "self_attn.o_proj" if sublayer < layers else "mlp.down_proj"
            weight = library.weight(sublayer, level).to(weights.device, weights.dtype, copy=True)
            state[f"model.layers.{sublayer % layers}.{name}.weight"] = weight
    return state


def _unpruned(config: LlamaConfig, weights: DecoderWeights, policy: Policy) -> dict[str, Tensor]:
    """Embedding, head and the norms of the sub-layers that stay."""
    state = {"model.embed_tokens.weight": weights.embedding.clone(), "model.norm.weight": weights.norm.clone()}
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = weights.head.clone()
    for index, layer in enumerate(weights.layers):
        if policy.attention[index]:
            state[f"model.layers.{index}.input_layernorm.weight"] = layer.attention_norm.clone()
        if policy.ffn[index]:
            state[f"model.layers.{index}.post_attention_layernorm.weight"] = layer.ffn_norm.clone()
    return state
