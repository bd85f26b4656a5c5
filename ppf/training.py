"""Training the predictor on experience."""

from __future__ import annotations

import torch
from torch import Tensor

from .predictor import Predictor, one_hot

_BATCH = 256
# Nats between the offset and the best measured log-perplexity. Smaller stresses the mild policies, larger the severe.
_HEADROOM = 1.0


def fit_predictor(
    predictor: Predictor, levels: Tensor, log_perplexity: Tensor, seed: int, steps: int = 800, fresh: bool = True
) -> None:
    """Fit ``predictor`` in place to levels int64 [N, S] and their measured log-perplexities [N].

    With ``fresh`` it starts from new weights; otherwise from the ones it has, which needs fewer ``steps``. Diverged
    measurements (NaN or infinite) must be left out by the caller.
    """
    device = predictor.center.device
    levels, targets = levels.to(device), log_perplexity.float().to(device)
    code = predictor.encode(one_hot(levels, predictor.grid))
    if fresh:
        predictor.initialise(seed)
        predictor.center.copy_(code.mean(0))
        _standardise(predictor, targets)
    held_out = _folds(len(targets), predictor.members, seed).to(device)
    targets = predictor.from_nats(targets)
    _descend(predictor, code, targets, held_out, seed, steps)
    with torch.no_grad():
        predictor.calibrate_uncertainty(predictor.standardised(code), held_out, targets)


def _standardise(predictor: Predictor, targets: Tensor) -> None:
    """Choose offset, mean and scale of the predicted quantity from the measured log-perplexities."""
    predictor.offset.copy_(targets.min() - _HEADROOM)
    logarithm = (targets - predictor.offset).log()
    predictor.target_mean.copy_(logarithm.mean())
    predictor.target_std.copy_(logarithm.std().clamp_min(1e-6))


def _folds(rows: int, members: int, seed: int) -> Tensor:
    """Bool [members, rows]: the rows that each member must not see; every row is hidden from two members or three."""
    generator = torch.Generator().manual_seed(seed)
    folds = members // 2
    fold = torch.randperm(rows, generator=generator) % folds
    return fold == (torch.arange(members) % folds)[:, None]


def _descend(predictor: Predictor, code: Tensor, targets: Tensor, held_out: Tensor, seed: int, steps: int) -> None:
    """AdamW on mean squared error, every member on minibatches of its own rows."""
    generator = torch.Generator().manual_seed(seed + 1)
    seen = [torch.nonzero(~mask).squeeze(1) for mask in held_out]
    optimiser = torch.optim.AdamW(predictor.parameters(), lr=3e-3, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.1)
    batch = min(_BATCH, min(len(rows) for rows in seen))
    for _ in range(steps):
        draws = [torch.randint(len(rows), (batch,), generator=generator) for rows in seen]
        index = torch.stack([rows[draw.to(rows.device)] for rows, draw in zip(seen, draws, strict=True)])
        loss = (predictor.standardised(code[index]) - targets[index]).square().mean(1).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
