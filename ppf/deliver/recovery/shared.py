"""The weights that all sizes share, in training: every policy is a cut of them, differentiable, as it is delivered.

Refits are linear in the dense weights: of an output projection W [hidden, n], the first w inputs get W[:, :w] +
W[:, w:] @ R, and R, which the library holds, is of the calibration text alone. So there is nothing to train but dense
weights, and the library makes of them, at any width, what was trained. After slimmable networks (Yu and Huang, arXiv
1903.05134): each step trains the largest model, the smallest, and some between, all under one teacher.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from ... import memory, ranks
from ...families import KINDS
from ...fast.permute import permute_layer
from ...fitting.run import Run
from ...fitting.session import Session
from ...model.build import LAYERS, build
from ...model.decoder import Decoder
from ...model.layer import LayerRanking
from ...model.policy import Policy
from ..elastic.model import elastic_model
from ..elastic.slots import Slot, slots_of
from .lowrank import LowRank
from .methods import trained_parameters
from .objective import Objective, Root
from .settings import ElasticSettings
from .sharding import widen

# Ratios are drawn from steps of half a percent, whose policies are asked for once.
_STEP = 0.005
# Of a GPU's free memory, and of the host's for a CPU, what regressions may take; others are solved when needed.
_REGRESSIONS_SHARE = 0.2


class Draws:
    """A run's policies from ``settings.smallest`` to ``settings.largest``, and which of them a step trains."""

    def __init__(self, run: Run, settings: ElasticSettings):
        count = 1 + max(1, round((settings.largest - settings.smallest) / _STEP))
        ratios = torch.linspace(settings.smallest, settings.largest, count, dtype=torch.float64)
        self.policies, self.settings = run.policies(ratios.tolist()), settings

    def at(self, step: int) -> list[Policy]:
        """The least pruned, the most pruned, and others at random, which follow from the seed and ``step`` alone."""
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        drawn = torch.randint(len(self.policies), (self.settings.policies - 2,), generator=generator)
        return [self.policies[0], self.policies[-1], *(self.policies[int(at)] for at in drawn)]


class SharedWeights:
    """A run's dense weights in ranking order, in training; see :class:`ppf.deliver.recovery.methods.Trainee`.

    Every process holds all of them, and trains on its share of a batch; gradients are summed.
    """

    def __init__(self, session: Session, settings: ElasticSettings):
        """Raises ``InputError`` for a family that holds several projections in one matrix."""
        ranked, self._run = session.permuted, session.run
        self._stored, self.device, self._draws = ranked.dtype, ranked.device, Draws(session.run, settings)
        self._decoder = replace(ranked, layers=(), outer={})
        self.model = elastic_model(_copied(ranked)).requires_grad_(False)
        if self.device.type == "cpu":
            self.model.float()
        self._slots = slots_of(ranked, self.model.model.layers)
        self._layers = [dict(layer.named_parameters()) for layer in self.model.model.layers]
        self._regressions = Regressions(session)
        self._lowrank = LowRank(self.model, settings) if settings.method == "lora" else None
        own = {} if self._lowrank else trained_parameters(self.model, settings.method)
        for parameter in own.values():
            parameter.requires_grad_(True)
        widen(self.model)
        self.root = Root(self.model)
        self.trained = self._lowrank.parameters if self._lowrank else trained_parameters(self.model, settings.method)
        self.begin(0)

    @property
    def turns(self) -> list[partial[Tensor]]:
        """One for each policy of the step; their mean is the loss."""
        return [partial(self.loss, policy, share=1 / len(self._drawn)) for policy in self._drawn]

    def begin(self, step: int) -> None:
        """Draw the policies of a step."""
        self._drawn = self._draws.at(step)

    def expect(self, last: bool) -> None:
        """Nothing is summed before all parts are done."""

    def settle(self) -> None:
        """Sum gradients over processes. What no policy of this step has gets one of zero, so that the optimiser counts
        the same steps everywhere."""
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if ranks.world() > 1:
                with ranks.together():
                    torch.distributed.all_reduce(parameter.grad)

    def loss(
        self, policy: Policy, objective: Objective, tokens: Tensor, taught: Tensor | None, share: float = 1.0
    ) -> Tensor:
        """``share`` of the ``objective`` of ``policy``'s model, as :meth:`Objective.__call__`."""
        cut = self._cut(policy)
        with self._placed(policy):
            return share * functional_call(self.root, cut, (objective, tokens, taught))

    @torch.no_grad()
    def merged(self) -> PreTrainedModel:
        """The dense model with the trained weights: units in checkpoint order, in the checkpoint's dtype."""
        decoder, state = self._decoder, {}
        for index in range(decoder.structure.layers):
            inverse = LayerRanking(*(self._run.ranking[index].of(kind).argsort() for kind in KINDS))
            found = permute_layer(decoder.names(index), {n: t.detach() for n, t in self._of(index).items()}, inverse)
            state |= {f"{LAYERS}{index}.{name}": tensor.to(self._stored) for name, tensor in found.items()}
        outer = (item for item in self.model.named_parameters() if not item[0].startswith(LAYERS))
        return build(decoder.config, state | {name: tensor.detach() for name, tensor in outer}, self._stored)

    def _of(self, index: int) -> Mapping[str, Tensor]:
        """All weights of a layer by names inside it, as they are by now."""
        found = self._layers[index]
        return found if self._lowrank is None else self._lowrank.updated(f"{LAYERS}{index}.", found)

    def _cut(self, policy: Policy) -> dict[str, Tensor]:
        """What ``policy`` has of all layers, by the names that the root knows it under."""
        found, layers = {}, [self._of(index) for index in range(self._decoder.structure.layers)]
        for slot in self._slots:
            width, names = policy[slot.kind][slot.index], self._decoder.names(slot.index)
            if not width or (width == slot.units and self._lowrank is None):
                continue  # absent, or the model's own
            layer = layers[slot.index]
            kept = names.prefix(layer, slot.kind, width, self._refitted(slot, layer, width))
            found |= {f"student.{LAYERS}{slot.index}.{name}": tensor for name, tensor in kept.items()}
        return found

    def _refitted(self, slot: Slot, layer: Mapping[str, Tensor], width: int) -> Tensor | None:
        """The output projection of so many units; None for all of them."""
        if width == slot.units:
            return None
        dense = layer[f"{self._decoder.family.parts[slot.kind].output_name}.weight"]
        regression = self._regressions.of(slot.kind, slot.index, width)
        stay = regression.shape[1]
        return dense[:, :stay] + dense[:, stay:] @ regression

    @contextmanager
    def _placed(self, policy: Policy) -> Iterator[None]:
        """The model with the sub-layers of ``policy`` for a while, then with all."""
        for slot in self._slots:
            slot.place(policy[slot.kind][slot.index] > 0)
        try:
            yield
        finally:
            for slot in self._slots:
                slot.place(True)


class Regressions:
    """The library's regressions, kept as far as there is room, in the dtype that products are computed in."""

    def __init__(self, session: Session):
        self._library, self._grid = session.library, session.run.grid
        cuda = session.device.type == "cuda"
        self._dtype = torch.bfloat16 if cuda else torch.float32
        self._room = _REGRESSIONS_SHARE * memory.room(session.device)
        self._kept: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    @torch.no_grad()
    def of(self, kind: str, index: int, width: int) -> Tensor:
        """[n - w, w] of a sub-layer that keeps ``width`` units, w inputs of its output projection."""
        sublayer = KINDS.index(kind) * self._grid.structure.layers + index
        key = sublayer, width // self._grid.steps[sublayer]
        if key not in self._kept:
            self._kept[key] = self._library.regression(*key).to(self._dtype)
            self._room -= self._kept[key].nbytes
            while self._room < 0 and len(self._kept) > 1:
                self._room += self._kept.popitem(last=False)[1].nbytes
        self._kept.move_to_end(key)
        return self._kept[key]


def _copied(decoder: Decoder) -> Decoder:
    """Tensors of its own: training changes them."""
    layers = tuple({name: tensor.clone() for name, tensor in layer.items()} for layer in decoder.layers)
    return replace(decoder, layers=layers, outer={name: tensor.clone() for name, tensor in decoder.outer.items()})
