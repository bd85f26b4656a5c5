"""The paper's way (arXiv 2508.02381): an actor-critic with the predictor as its environment.

An episode is one step: the state is the budget (and the sub-layers' statistics), the action all widths at once, drawn
from the actor's relaxed policy and projected onto the budget; the reward is the negative predicted log-perplexity. The
critic predicts the reward from the budget; what a policy earns beyond that is its advantage. Hundreds of episodes run
in parallel on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..candidates.breeding import cautious, move
from ..predictor import Predictor
from .actor import Agent
from .episodes import stratified_ratios
from .features import BUDGET_FEATURES, budget_features

_RATE = 3e-3
_DRAWS = 8  # episodes of each budget in a step
_ENTROPY = 1e-3


def train_actor_critic(
    agent: Agent, predictor: Predictor, seed: int, steps: int = 400, batch: int = 64, caution: float = 0.0
) -> None:
    """Train ``agent`` in place; arguments as for :func:`ppf.choose.agent.pathwise.train_pathwise`, on ``batch``
    budgets of several episodes each."""
    generator, critic = torch.Generator().manual_seed(seed), _critic(seed).to(agent.device)
    optimiser = torch.optim.Adam([*agent.parameters(), *critic.parameters()], lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps, pct_start=0.1)
    judge = cautious(predictor, caution)
    near = None
    for step in range(steps):
        ratio = stratified_ratios(batch, generator).to(agent.device)
        probabilities, near = agent.relaxed_near(ratio, 0.1 ** (step / steps), near)
        action = _drawn(probabilities, generator)
        with torch.no_grad():
            projected = move(action.flatten(0, 1), agent.grid, ratio.repeat_interleave(_DRAWS))
            reward = -judge(projected).view(batch, _DRAWS).to(agent.device)
        expected = critic(budget_features(ratio)).expand(-1, _DRAWS)
        loss = _actor_loss(probabilities, action, reward - expected.detach()) + (expected - reward).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()


def _critic(seed: int) -> nn.Sequential:
    critic = nn.Sequential(nn.Linear(BUDGET_FEATURES, 64), nn.SiLU(), nn.Linear(64, 1))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return critic


def _drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Levels int64 [B, draws, S] drawn from [B, S, K] by inverting the cumulative distribution."""
    cumulative = probabilities.detach().cumsum(-1)[:, None]
    place = torch.rand((len(probabilities), _DRAWS, probabilities.shape[1], 1), generator=generator)
    return (cumulative < place.to(cumulative.device)).sum(-1).clamp_max(probabilities.shape[-1] - 1)


def _actor_loss(probabilities: Tensor, action: Tensor, advantage: Tensor) -> Tensor:
    """Policy gradient with standardised advantages [B, draws], and a little entropy against early certainty."""
    logarithm = probabilities.clamp_min(1e-12).log()
    chosen = logarithm[:, None].expand(-1, _DRAWS, -1, -1).gather(-1, action[..., None]).squeeze(-1).sum(-1)
    advantage = advantage / advantage.std().clamp_min(1e-6)
    entropy = -(probabilities * logarithm).sum(-1).mean()
    return -(advantage * chosen).mean() - _ENTROPY * entropy
