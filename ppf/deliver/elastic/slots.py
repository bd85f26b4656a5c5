"""The places of an elastic model that change with the policy: found once, so that a switch only fills them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ...families import KINDS
from ...fast.runtime.plan import Plan
from ...model.classes import plain_parts
from ...model.decoder import Decoder
from ...model.perlayer import Absent

Cut = tuple[Tensor, ...] | None
"""The tensors of a sub-layer of some width, in the order of its slot's parameters; None for width 0."""


@dataclass(frozen=True, eq=False)
class Form:
    """All that a policy is made of: a cut for every slot, the runtime's plan if it serves the model, and the types of
    the layers if there are several."""

    tensors: Sequence[Cut]
    plan: Plan | None
    layer_types: Sequence[str] | None


class Slot:
    """A sub-layer that the dense model has: its parameters that have units, and its modules, there and absent."""

    def __init__(self, decoder: Decoder, index: int, kind: str, layer: nn.Module):
        self.kind, self.index = kind, index
        self._names, self._dense = decoder.names(index), decoder.layers[index]
        self._unit_tensors = [unit.name for unit in self._names.unit_tensors(self._dense, kind)]
        self._parameters = [layer.get_parameter(name) for name in self._unit_tensors]
        part = next(p for k, p in zip(KINDS, plain_parts(decoder.family), strict=True) if k == kind)
        self._owner = layer._modules
        self._present = {name: self._owner[name] for name in (part["module"], *part["norms"])}
        self._absent = {part["module"]: Absent(part["results"])} | {name: nn.Identity() for name in part["norms"]}

    @property
    def units(self) -> int:
        """Units of the dense sub-layer."""
        return self._names.units(self.kind)

    def cut(self, width: int, output: Tensor | None = None) -> Cut:
        """The dense tensors, cut to ``width`` units; ``output`` in place of the output projection."""
        if not width:
            return None
        kept = self._names.prefix(self._dense, self.kind, width, output)
        return tuple(kept[name] for name in self._unit_tensors)

    def place(self, there: bool) -> None:
        """Put the sub-layer into its layer, or take it out."""
        self._owner.update(self._present if there else self._absent)

    def fill(self, tensors: Cut) -> None:
        """Take a cut, in place."""
        self.place(tensors is not None)
        for parameter, tensor in zip(self._parameters if tensors else (), tensors or (), strict=True):
            parameter.data = tensor


def slots_of(decoder: Decoder, layers: Sequence[nn.Module]) -> list[Slot]:
    """The slots of a model's ``layers``, which hold the tensors of ``decoder``; layer by layer."""
    return [
        Slot(decoder, index, kind, layer)
        for index, layer in enumerate(layers)
        for kind in KINDS
        if decoder.structure.of(kind)[index].units
    ]
