"""Peers: how other people's methods would allocate, on the same library, ranking and evaluator.

Every method is a function ``allocate(structure, statistics, budget) -> Policy`` in a file of its own. Policies lie on
the grid and cost what the budget says: where a method's own rounding or clamping drifts, the projection corrects it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...choose.budget import Budget
from ...errors import InputError
from ...model.policy import Policy
from ...model.structure import Structure
from . import (
    adapt_pruner,
    alphapruning,
    atp,
    cfsp,
    evolution,
    finercut,
    flap,
    global_mp,
    owl,
    puzzle,
    random,
    shortgpt,
    tracenas,
    uniform,
    uniql,
)
from .statistics import Meter, PeerStatistics

Allocate = Callable[[Structure, PeerStatistics, Budget], Policy]


@dataclass(frozen=True)
class Peer:
    """A method, its one-line description, and the true evaluations it is given unless one says otherwise (0: it needs
    none)."""

    allocate: Allocate
    about: str
    evaluations: int = 0


PEERS: dict[str, Peer] = {
    "uniform": Peer(uniform.allocate, "the same share of every sub-layer"),
    "uniform-split": Peer(uniform.allocate_split, "the best share for attention and FFN, the same in all layers", 11),
    "random": Peer(random.allocate, "the best of random policies", 150),
    "global-mp": Peer(global_mp.allocate, "Global MP: one magnitude threshold for all weights"),
    "flap": Peer(flap.allocate, "FLAP's global threshold over standardised scores, by cost"),
    "owl": Peer(owl.allocate, "OWL: layers with outliers keep more"),
    "alphapruning": Peer(alphapruning.allocate, "AlphaPruning: heavy-tailed layers keep more"),
    # The most that its search has where layers are 32 and the ratio is 50 %.
    "atp": Peer(atp.allocate, "ATP: ratios that rise from layer to layer", 16),
    "cfsp": Peer(cfsp.allocate, "CFSP: layers that turn the residual stream keep more"),
    "uniql": Peer(uniql.allocate, "UniQL: softmax over block influence"),
    "adapt-pruner": Peer(adapt_pruner.allocate, "Adapt-Pruner: layers by influence, in many small steps"),
    "shortgpt": Peer(shortgpt.allocate, "ShortGPT: whole layers go by block influence"),
    "finercut": Peer(finercut.allocate, "FinerCut: sub-layers go greedily", 100_000),
    "puzzle": Peer(puzzle.allocate, "Puzzle: additive scores and an integer program", 100_000),
    "tracenas": Peer(tracenas.allocate, "TraceNAS: evolution on gradient agreement"),
    "evopress": Peer(evolution.allocate_staged, "EvoPress, DarwinLM, Týr: staged (1 + 128) evolution", 1_500),
    "evolution": Peer(evolution.allocate, "plain (8 + 8) evolution, every offspring measured", 1_500),
}


def peer_named(name: str) -> Peer:
    """The method called ``name``; raises ``InputError`` with the names there are."""
    if name not in PEERS:
        raise InputError("methods", name, "is not a method", f"Use some of {', '.join(PEERS)}")
    return PEERS[name]


__all__ = ["PEERS", "Allocate", "Meter", "Peer", "PeerStatistics", "peer_named"]
