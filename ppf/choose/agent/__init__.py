"""The agent: budget → policy in one forward pass, meeting the budget exactly; and the ways to train it."""

from .actor import Agent, error_energies
from .training import DEFAULT, TRAINERS, train_agent, trainer_named

__all__ = ["DEFAULT", "TRAINERS", "Agent", "error_energies", "train_agent", "trainer_named"]
