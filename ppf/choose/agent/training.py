"""Training the agent: a way of learning from the predictor, then expert iteration on what breeding finds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ...errors import InputError
from ...timings import timed
from ..candidates.breeding import Effort, cautious
from ..predictor import Predictor
from .actor import Agent
from .actor_critic import train_actor_critic
from .episodes import stratified_ratios
from .expert import imitate_breeding
from .pathwise import train_pathwise

TRAINERS: dict[str, Callable[..., None]] = {"pathwise": train_pathwise, "actor-critic": train_actor_critic}
DEFAULT = "pathwise"

_IMITATION, _POLISHING = 300, 50  # steps of an expert round
_BUDGETS = 4  # times the batch: budgets at which policies are bred to be imitated
_COLD, _GENTLE = 0.1, 3e-4  # temperature and learning rate of polishing
_TRIALS = 64  # ratios at which an agent is judged
_OTHER = 7919  # sets their seed apart from that of training


def trainer_named(name: str) -> Callable[..., None]:
    """The way of training called ``name``; raises ``InputError`` with the names there are."""
    if name not in TRAINERS:
        raise InputError("agent", name, "is not a way to train the agent", f"Use one of {', '.join(TRAINERS)}")
    return TRAINERS[name]


@timed("learning agent")
def train_agent(
    agent: Agent,
    predictor: Predictor,
    seed: int,
    steps: int = 400,
    batch: int = 64,
    caution: float = 0.0,
    kind: str = DEFAULT,
    experts: int = 1,
) -> None:
    """Train ``agent`` in place against ``predictor`` over all ratios, then ``experts`` rounds of expert iteration.

    A round imitates what breeding finds and polishes that along the pathwise gradient; what makes the agent worse is
    undone. ``predictor`` is left as it is; ``caution`` adds that many of its standard deviations to what is minimised.
    """
    learns = [parameter for parameter in predictor.parameters() if parameter.requires_grad]
    predictor.requires_grad_(False)
    try:
        trainer_named(kind)(agent, predictor, seed, steps, batch, caution)
        for number in range(1, experts + 1):
            _expert_round(agent, predictor, seed + number, steps, batch, caution)
    finally:
        for parameter in learns:
            parameter.requires_grad_(True)


def _expert_round(agent: Agent, predictor: Predictor, seed: int, steps: int, batch: int, caution: float) -> None:
    effort, imitation = Effort(generations=max(4, steps // 16)), min(_IMITATION, 3 * steps // 2)
    with _undone_if_worse(agent, predictor, seed, caution):
        imitate_breeding(agent, predictor, seed, _BUDGETS * batch, imitation, effort, caution)
        train_pathwise(agent, predictor, seed, _POLISHING, batch, caution, warm=_COLD, rate=_GENTLE)


@contextmanager
def _undone_if_worse(agent: Agent, predictor: Predictor, seed: int, caution: float) -> Iterator[None]:
    """Whatever is done to ``agent`` inside stays only if the predictor likes its answers at other ratios better."""
    judge = cautious(predictor, caution)
    ratio = stratified_ratios(_TRIALS, torch.Generator().manual_seed(seed + _OTHER)).to(agent.device)
    state, score = copy.deepcopy(agent.state_dict()), judge(agent(ratio)).mean()
    yield
    if judge(agent(ratio)).mean() > score:
        agent.load_state_dict(state)
