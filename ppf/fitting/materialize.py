"""Materialising: a policy becomes a physically smaller model, tensor by tensor or in memory.

Layer by layer, the rows that feed units are gathered together, on a GPU by the CUDA gather; output projections come
from the library, refitted to the kept units (or are gathered too, where there is none).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from ..families import KINDS
from ..fast.permute import gathered, unit_jobs
from ..model.build import LAYERS, build, pruned_config
from ..model.decoder import Decoder
from ..model.grid import Grid
from ..model.layer import Layer, LayerRanking
from ..model.policy import Policy
from .library import Library

Teacher = Callable[[Iterator[dict[str, Tensor]]], Iterator[dict[str, Tensor]]]
"""Given the kept layers in order, gives each of them after its training, for instance
:meth:`ppf.fitting.reconstruction.Reconstruction.taught`."""


def materialize(
    decoder: Decoder, ranking: Sequence[LayerRanking], grid: Grid, policy: Policy, library: Library | None = None,
    taught: Teacher | None = None,
) -> PreTrainedModel:  # fmt: skip
    """The pruned model, in the dtype and on the device of ``decoder`` (dense, in checkpoint order).

    A uniform policy gives a stock model of the family, any other the family's class with widths of its own in every
    layer. Raises ``InputError`` for a policy off the grid.
    """
    state = {
        # The model owns its weights.
        name: tensor.clone() if name in decoder.outer else tensor
        for name, tensor in pruned_tensors(decoder, ranking, grid, policy, library, taught)
    }
    return build(pruned_config(decoder.config, policy), state, dtype=decoder.dtype)


def pruned_tensors(
    decoder: Decoder, ranking: Sequence[LayerRanking], grid: Grid, policy: Policy, library: Library | None = None,
    taught: Teacher | None = None,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Name and tensor of every weight of :func:`materialize`'s model, layer by layer in ascending order, then what lies
    outside the layers, which is the decoder's own; all else is nobody's but the caller's.

    Holds one layer at a time, of a ``decoder`` whose layers stream too, and those that ``taught`` is training. Raises
    ``InputError`` for a policy off the grid, when the first tensor is asked for.
    """
    grid.check(policy)
    indices = range(decoder.structure.layers)
    layers = (_layer(decoder, index, ranking[index], grid, policy, library) for index in indices)
    for index, found in enumerate(layers if taught is None else taught(layers)):
        yield from ((f"{LAYERS}{index}.{name}", found.pop(name)) for name in list(found))
    yield from decoder.outer.items()


def _layer(
    decoder: Decoder, index: int, order: LayerRanking, grid: Grid, policy: Policy, library: Library | None
) -> dict[str, Tensor]:
    """What stays of one layer, by names inside it. Keeps no reference to the layer: the next one may need its room."""
    layer = decoder.layers[index]
    found = _units(decoder, index, layer, order, policy, with_outputs=library is None)
    if library is not None:
        found |= _refitted(decoder, index, grid, policy, library)
    return found | _whole(decoder, layer, {kind: policy[kind][index] for kind in KINDS}, found)


def _units(
    decoder: Decoder, index: int, layer: Layer, order: LayerRanking, policy: Policy, with_outputs: bool
) -> dict[str, Tensor]:
    """What a layer keeps of all tensors that units have a part in, by names inside it."""
    named = []
    for kind in KINDS:
        kept = order.of(kind)[: policy[kind][index]]
        if len(kept):
            named += unit_jobs(decoder.names(index), layer, kind, kept, with_outputs)
    return dict(zip([name for name, _ in named], gathered([job for _, job in named]), strict=True))


def _refitted(decoder: Decoder, index: int, grid: Grid, policy: Policy, library: Library) -> dict[str, Tensor]:
    """A layer's refitted output projections, copies."""
    found, levels = {}, grid.encode([policy])[0].tolist()
    for place, kind in enumerate(KINDS):
        sublayer = index + place * grid.structure.layers
        if levels[sublayer]:
            weight = library.solved(sublayer, levels[sublayer]).to(decoder.device, decoder.dtype, copy=True)
            found[f"{decoder.family.parts[kind].output_name}.weight"] = weight
    return found


def _whole(decoder: Decoder, layer: Layer, widths: Mapping[str, int], known: Collection[str]) -> dict[str, Tensor]:
    """Copies of what stays whole of a layer: norms, say, unless their sub-layer goes."""
    found = {}
    for name, tensor in layer.items():
        owner = next((kind for kind, part in decoder.family.parts.items() if part.owns(name)), None)
        if name not in known and (owner is None or widths[owner]):
            found[name] = tensor.clone()
    return found
