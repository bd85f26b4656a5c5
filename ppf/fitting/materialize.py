"""Materialising: a policy becomes a physically smaller model, on the device the dense weights are on.

The rows that feed units are gathered in one batch for the whole model, on a GPU by the CUDA gather; output projections
come from the library, refitted to the kept units (or are gathered too, where there is none).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ..families import KINDS
from ..fast.permute import Job, gathered, unit_jobs
from ..model.build import LAYERS, build, pruned_config
from ..model.decoder import Decoder
from ..model.grid import Grid
from ..model.layer import LayerRanking
from ..model.policy import Policy
from .library import Library


def materialize(
    decoder: Decoder, ranking: Sequence[LayerRanking], grid: Grid, policy: Policy, library: Library | None = None
) -> PreTrainedModel:
    """The pruned model, in the dtype and on the device of ``decoder`` (dense, in checkpoint order).

    A uniform policy gives a stock model of the family, any other the family's class with widths of its own in every
    layer. Raises ``InputError`` for a policy off the grid.
    """
    grid.check(policy)
    named = list(_jobs(decoder, ranking, policy, with_outputs=library is None))
    state = dict(zip([name for name, _ in named], gathered([job for _, job in named]), strict=True))
    if library is not None:
        state |= _refitted(decoder, grid, policy, library)
    state |= _unpruned(decoder, policy, set(state))
    return build(pruned_config(decoder.config, policy), state, dtype=decoder.dtype)


def _jobs(
    decoder: Decoder, ranking: Sequence[LayerRanking], policy: Policy, with_outputs: bool
) -> Iterator[tuple[str, Job]]:
    """Full names and gathers of all tensors of which a policy keeps units."""
    for index, (layer, order) in enumerate(zip(decoder.layers, ranking, strict=True)):
        for kind in KINDS:
            kept = order.of(kind)[: policy[kind][index]]
            if len(kept):
                for name, job in unit_jobs(decoder.names(index), layer, kind, kept, with_outputs):
                    yield f"{LAYERS}{index}.{name}", job


def _refitted(decoder: Decoder, grid: Grid, policy: Policy, library: Library) -> dict[str, Tensor]:
    """Refitted output projections of the sub-layers that stay, copied so that the model owns its weights."""
    layers, state = grid.structure.layers, {}
    for sublayer, level in enumerate(grid.encode([policy])[0].tolist()):
        if level:
            name = decoder.family.parts[KINDS[sublayer // layers]].output_name
            weight = library.weight(sublayer, level).to(decoder.device, decoder.dtype, copy=True)
            state[f"{LAYERS}{sublayer % layers}.{name}.weight"] = weight
    return state


def _unpruned(decoder: Decoder, policy: Policy, known: set[str]) -> dict[str, Tensor]:
    """What lies outside the layers, and what stays whole of the sub-layers that stay."""
    state = {name: tensor.clone() for name, tensor in decoder.outer.items()}
    for index, layer in enumerate(decoder.layers):
        for name, tensor in layer.items():
            owner = next((kind for kind, part in decoder.family.parts.items() if part.owns(name)), None)
            full = f"{LAYERS}{index}.{name}"
            if full not in known and (owner is None or policy[owner][index]):
                state[full] = tensor.clone()
    return state
