"""The training loop: AdamW with warm-up and cosine decay, gradient clipping, a state on disk every so often."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import InputError, PPFError
from ...progress import Progress
from .corpus import Corpus
from .methods import Student
from .objective import Objective
from .settings import RecoverySettings
from .state import Unfinished

_WARM_UP_SHARE = 0.05
_BETAS = (0.9, 0.95)
_WEIGHT_DECAY = 0.01  # of matrices
_LARGEST_NORM = 1.0
# Saving may take a twentieth of the time, and at most so many seconds of work are lost by a kill.
_SAVE_SECONDS = 20.0
_SAVE_SHARE = 0.05
# Bytes that one token's activations take in a layer, for each number of the hidden state: about 34 numbers in bf16.
_ACTIVATION_BYTES = 70
_ACTIVATION_MEMORY = {"cuda": 16 << 30, "cpu": 1 << 30}


class Training:
    """One recovery of ``student`` on ``corpus``; :meth:`run` goes on where the state on disk stopped."""

    def __init__(
        self, student: Student, corpus: Corpus, objective: Objective, settings: RecoverySettings, unfinished: Unfinished
    ):
        self.student, self.corpus, self.objective = student, corpus, objective
        self.settings, self.unfinished = settings, unfinished
        self.device = student.model.device
        self.optimizer = _adamw(list(student.trained.values()), self.device)
        self.losses = torch.zeros(settings.steps, device=self.device)
        self.micro = settings.micro_tokens or _fitting_tokens(student.model)
        self.step = 0

    def run(self, progress: Progress) -> list[float]:
        """Train to the end; the loss of every step in nats a token. Raises ``PPFError`` if the training diverges."""
        self._restore()
        tokens = self.settings.batch * self.settings.sequence_length
        saved, cost = time.monotonic(), 0.0
        progress("recover", self.step * tokens, self.settings.steps * tokens)
        while self.step < self.settings.steps:
            self._advance()
            progress("recover", self.step * tokens, self.settings.steps * tokens)
            if time.monotonic() - saved >= max(_SAVE_SECONDS, cost / _SAVE_SHARE):
                start = time.monotonic()
                self._save()
                saved, cost = time.monotonic(), time.monotonic() - start
        self._save()
        return self.losses.tolist()

    def _advance(self) -> None:
        """One step of the optimizer."""
        settings = self.settings
        batch = self.corpus.batch(self.step, settings.batch, settings.seed)
        predicted = batch.numel() - len(batch)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(self.step, settings.steps)
        try:
            for part in batch.split(max(1, self.micro // settings.sequence_length)):
                self.losses[self.step] += self._backward(part.to(self.device, non_blocking=True), predicted)
        except torch.OutOfMemoryError:
            problem = f"does not fit into the memory of {self.device} with method {settings.method}"
            raise InputError("micro-tokens", self.micro, problem, "Use fewer, or another method") from None
        torch.nn.utils.clip_grad_norm_(self.student.trained.values(), _LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _backward(self, tokens: Tensor, predicted: int) -> Tensor:
        """Add the gradient of int64 ``tokens`` [B, T], a part of a batch with ``predicted`` targets."""
        # On a CPU everything is fp32.
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.objective(self.student.model, tokens) / predicted
        loss.backward()
        return loss.detach()

    def _save(self) -> None:
        """Write the state, after a look at the losses: a diverged state must not replace a good one."""
        if not bool(torch.isfinite(self.losses[: self.step]).all()):
            rate = self.settings.learning_rate
            raise PPFError(
                f"the loss is no longer finite at step {self.step}. Use a smaller --learning-rate than {rate}"
            )
        state = {"step": torch.tensor(self.step), "losses": self.losses}
        for name, parameter in self.student.trained.items():
            moments = self.optimizer.state[parameter]
            state[f"weight.{name}"] = parameter.data
            state |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        self.unfinished.save(state)

    def _restore(self) -> None:
        state = self.unfinished.load(self.device)
        if state is None:
            return
        self.step, self.losses = int(state["step"]), state["losses"]
        for name, parameter in self.student.trained.items():
            parameter.data.copy_(state[f"weight.{name}"])
            moments = {key: state[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            # Where AdamW itself keeps it: on the device if fused.
            steps = torch.tensor(float(self.step), device=self.device)
            self.optimizer.state[parameter] = {"step": steps} | moments


def schedule(step: int, steps: int) -> float:
    """The learning rate of ``step`` (from 0) as a share of its peak: a linear rise, then half a cosine to zero."""
    rise = max(1, round(steps * _WARM_UP_SHARE))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise + 1) / (steps - rise + 1)))


def _adamw(parameters: list[torch.nn.Parameter], device: torch.device) -> torch.optim.AdamW:
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": _WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, betas=_BETAS, fused=device.type == "cuda")


def _fitting_tokens(model: PreTrainedModel) -> int:
    """Tokens whose activations should fit beside the model."""
    a_token = model.config.num_hidden_layers * model.config.hidden_size * _ACTIVATION_BYTES
    return max(1, _ACTIVATION_MEMORY[model.device.type] // a_token)
