"""Training the agent: a way of learning from the predictor, then expert iteration on what breeding finds."""

from __future__ import annotations

from collections.abc import Callable

from ..breeding import Effort
from ..errors import InputError
from ..predictor import Predictor
from .actor import Agent
from .actor_critic import train_actor_critic
from .expert import improve_by_breeding
from .pathwise import train_pathwise

TRAINERS: dict[str, Callable[..., None]] = {"pathwise": train_pathwise, "actor-critic": train_actor_critic}
DEFAULT = "pathwise"


def trainer_named(name: str) -> Callable[..., None]:
    """The way of training called ``name``; raises ``InputError`` with the names there are."""
    if name not in TRAINERS:
        raise InputError("agent", name, "is not a way to train the agent", f"Use one of {', '.join(TRAINERS)}")
    return TRAINERS[name]


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

    ``predictor`` is left as it is; ``caution`` adds that many of its standard deviations to what is minimised.
    """
    learns = [parameter for parameter in predictor.parameters() if parameter.requires_grad]
    predictor.requires_grad_(False)
    try:
        trainer_named(kind)(agent, predictor, seed, steps, batch, caution)
        for round_ in range(experts):
            effort = Effort(generations=max(4, steps // 16))
            improve_by_breeding(agent, predictor, seed + 1 + round_, 2 * batch, steps // 2, effort, caution)
    finally:
        for parameter in learns:
            parameter.requires_grad_(True)
