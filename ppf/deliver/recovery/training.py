"""The training loop: AdamW with warm-up and cosine decay, gradient clipping, a state on disk every so often.

Many processes go through it together: each takes its share of every batch, and of every weight (:mod:`.sharding`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor

from ... import ranks
from ...errors import PPFError
from ...progress import Progress
from ...timings import timed
from .corpus import Corpus
from .methods import Trainee
from .objective import Objective
from .parts import Micro, Part, parts_of
from .settings import RecoverySettings
from .sharding import put, total, whole
from .state import Unfinished
from .teaching import Teacher

_WARM_UP_SHARE = 0.05
_BETAS = (0.9, 0.95)
_WEIGHT_DECAY = 0.01  # of matrices
_LARGEST_NORM = 1.0
# Saving may take a twentieth of the time, and at most so many seconds of work are lost by a kill.
_SAVE_SECONDS = 20.0
_SAVE_SHARE = 0.05
_MOMENTS = "exp_avg", "exp_avg_sq"


class Training:
    """One recovery of ``student`` on ``corpus``; :meth:`run` goes on where the state on disk stopped.

    What it needs between steps is allocated at once, AdamW's moments too, so that what is left is for the teacher.
    """

    def __init__(self, student: Trainee, corpus: Corpus, settings: RecoverySettings, unfinished: Unfinished):
        self.student, self.corpus, self.settings, self.unfinished = student, corpus, settings, unfinished
        self.device = student.device
        self.optimizer = _adamw(list(student.trained.values()), self.device)
        self.losses = torch.zeros(settings.steps, device=self.device)
        self.micro = Micro(student.model.config, self.device, settings)
        self.step = 0

    @timed("training")
    def run(self, teacher: Teacher | None, progress: Progress) -> list[float]:
        """Train to the end; the loss of every step in nats a token. Raises ``PPFError`` if the training diverges, and
        ``InputError`` if not even one sequence at once fits into memory."""
        self.teacher = teacher
        self.objective = Objective(teacher and teacher.head, self.settings.distillation)
        self._restore()
        self.micro.agree(self.corpus.training[:1], self._rehearse)
        tokens = self.settings.batch * self.settings.sequence_length
        saved, cost = time.monotonic(), 0.0
        progress("recover", self.step * tokens, self.settings.steps * tokens)
        while self.step < self.settings.steps:
            self._advance()
            progress("recover", self.step * tokens, self.settings.steps * tokens)
            if ranks.broadcast(time.monotonic() - saved >= max(_SAVE_SECONDS, cost / _SAVE_SHARE)):
                start = time.monotonic()
                self._save()
                saved, cost = time.monotonic(), time.monotonic() - start
        self._save()
        return self.losses.tolist()

    def _advance(self) -> None:
        """One step of the optimizer."""
        settings = self.settings
        batch = self.corpus.batch(self.step, settings.batch, settings.seed)
        self.student.begin(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(self.step, settings.steps)
        while (loss := self._try(batch)) is None:
            self.micro.halve()
        self.student.settle()
        self.losses[self.step] = total(loss)
        torch.nn.utils.clip_grad_norm_(self.student.trained.values(), _LARGEST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _try(self, batch: Tensor) -> Tensor | None:
        """This process's share of the loss, its gradients left with the weights; None if memory did not suffice."""
        predicted = batch.numel() - len(batch)
        try:
            return self._accumulate(parts_of(batch, self.micro.sequences), predicted)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            return None  # what the attempt held is let go with its traceback

    def _accumulate(self, parts: list[Part], predicted: int) -> Tensor:
        """Loss fp32 [] of ``parts`` of a batch with so many ``predicted`` tokens; its gradients are added."""
        parts = [(tokens.to(self.device, non_blocking=True), counts) for tokens, counts in parts]
        loss, lessons = torch.zeros((), device=self.device), self._lessons([tokens for tokens, _ in parts])
        for number, (tokens, counts) in enumerate(parts, 1):
            self.student.expect(last=number == len(parts))
            taught = next(lessons)
            for turn in self.student.turns:
                # On a CPU everything is fp32.
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
                    part = turn(self.objective, tokens, taught) / predicted
                (part if counts else 0 * part).backward()
                if counts:
                    loss += part.detach()
        return loss

    def _lessons(self, parts: list[Tensor]) -> Iterator[Tensor | None]:
        return repeat(None) if self.teacher is None else self.teacher.hidden(parts)

    def _rehearse(self, rows: Tensor) -> None:
        """What a part of these sequences asks of memory, and nothing else."""
        self._accumulate([(rows, False)], predicted=1)
        self.optimizer.zero_grad(set_to_none=True)

    def _save(self) -> None:
        """Write the state, after a look at the losses: a diverged state must not replace a good one."""
        if not bool(torch.isfinite(self.losses[: self.step]).all()):
            rate = self.settings.learning_rate
            raise PPFError(
                f"the loss is no longer finite at step {self.step}. Use a smaller --learning-rate than {rate}"
            )
        state = {"step": torch.tensor(self.step), "losses": self.losses}
        for name, parameter in self.student.trained.items():
            state[f"weight.{name}"] = whole(parameter.data)
            state |= {f"{key}.{name}": whole(self.optimizer.state[parameter][key]) for key in _MOMENTS}
        ranks.from_first(lambda: self.unfinished.save(state))

    def _restore(self) -> None:
        state: dict[str, Tensor] = {}
        step = ranks.from_first(lambda: self._read(state))
        if step is None:
            return
        self.step, self.losses = step, ranks.broadcast(state.get("losses", self.losses).cpu()).to(self.device)
        for name, parameter in self.student.trained.items():
            put(parameter, state.get(f"weight.{name}"))
            moments = self.optimizer.state[parameter]
            moments["step"].fill_(self.step)
            for key in _MOMENTS:
                put(moments[key], state.get(f"{key}.{name}"))

    def _read(self, state: dict[str, Tensor]) -> int | None:
        """Fill ``state`` with what is on disk; the step it is of."""
        # Shares of a tensor are given out one tensor at a time.
        found = self.unfinished.load(self.device if ranks.world() == 1 else torch.device("cpu"), self._shapes())
        state.update(found or {})
        return None if found is None else int(found["step"])

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all that a state holds."""
        prefixes = "weight", *_MOMENTS
        trained = {f"{p}.{name}": tuple(w.shape) for p in prefixes for name, w in self.student.trained.items()}
        return trained | {"step": (), "losses": tuple(self.losses.shape)}


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
    optimizer = torch.optim.AdamW(filled, betas=_BETAS, fused=device.type == "cuda")
    for parameter in parameters:
        # As AdamW itself begins, at its first step; on the device if fused.
        moments = {key: torch.zeros_like(parameter.detach()) for key in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(0.0, device=device)} | moments
    return optimizer
