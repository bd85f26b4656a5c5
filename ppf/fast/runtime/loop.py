"""The token loop: a graph replay a token, and nothing the device would have to wait for.

Whether a sequence has ended is known on the device first. The host reads it (and a streamer's tokens) after it has
queued the step behind, so the device never idles; when the answer is "stop", that one step was for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from .prefill import prefill
from .session import MAX_EOS, Session


@dataclass
class Request:
    """What transformers' ``generate`` has prepared: prompts ids int64 [B, T], padded on the left by ``start`` [B]."""

    ids: Tensor
    start: Tensor
    padded: bool  # whether any of ``start`` is not 0
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any = None

    @property
    def limit(self) -> int:
        """Length at which all sequences stop."""
        lengths = [c.max_length for c in self.criteria if isinstance(c, MaxLengthCriteria)]
        return min([self.config.max_length, *lengths])

    @property
    def eos(self) -> list[int]:
        """Ids that end a sequence."""
        return sorted({i for c in self.criteria if hasattr(c, "eos_token_id") for i in c.eos_token_id.tolist()})

    @property
    def pad(self) -> int:
        """Id that stands after a sequence's end."""
        pad = self.config._pad_token_tensor
        return 0 if pad is None else int(pad)

    @property
    def is_greedy(self) -> bool:
        """True if the graph can choose the tokens and see the ends by itself."""
        known = all(type(c) in (EosTokenCriteria, MaxLengthCriteria) for c in self.criteria)
        return known and not self.processors and not self.config.do_sample and len(self.eos) <= MAX_EOS


def run(session: Session, request: Request) -> Tensor:
    """Generate: int64 [B, up to limit], prompts included, as transformers' plain loop returns them."""
    batch, length = request.ids.shape
    ids = torch.empty(batch, request.limit, dtype=torch.int64, device=request.ids.device)
    ids[:, :length] = request.ids
    session.reset(request.start, request.eos if request.is_greedy else [], request.pad)
    choose = _greedy(session) if request.is_greedy else _chooser(session, request)
    watched = request.streamer is not None or not request.is_greedy or bool(request.eos)
    watch = _Watch(batch, ids.device) if watched else None
    prefill(session, request.ids, request.padded)
    while True:
        token, finished = choose(ids, length)
        ids[:, length] = token
        length += 1
        if watch is not None:
            watch.note(finished, token)
        at_limit = length == request.limit
        if not at_limit:
            session.advance()
        stop = watch is not None and watch.read(request.streamer)
        if at_limit or stop:
            break
    if request.streamer is not None:
        request.streamer.end()
    return ids[:, :length]


def _greedy(session: Session) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    return lambda ids, length: (session.token, session.finished)


def _chooser(session: Session, request: Request) -> Callable[[Tensor, int], tuple[Tensor, Tensor]]:
    """transformers' own processors, sampling and criteria on the session's logits."""
    unfinished = torch.ones(len(request.ids), dtype=torch.int64, device=request.ids.device)
    finished = session.finished
    has_eos, pad = bool(request.eos), request.pad

    def choose(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
        scores = request.processors(ids[:, :length], session.logits.clone())
        if request.config.do_sample:
            token = torch.multinomial(nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            token = scores.argmax(-1)
        if has_eos:
            token = token * unfinished + pad * (1 - unfinished)
        session.token.copy_(token)
        following = torch.cat((ids[:, :length], token[:, None]), 1)
        unfinished.mul_(~request.criteria(following, None))
        finished.copy_(1 - unfinished)
        return token, finished

    return choose


class _Watch:
    """The newest token and which sequences have ended, brought to the host behind the device's back."""

    def __init__(self, batch: int, device: torch.device):
        pinned = device.type == "cuda"
        self._finished = torch.zeros(batch, dtype=torch.int8, pin_memory=pinned)
        self._token = torch.zeros(batch, dtype=torch.int64, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None

    def note(self, finished: Tensor, token: Tensor) -> None:
        self._finished.copy_(finished, non_blocking=True)
        self._token.copy_(token, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def read(self, streamer: Any) -> bool:
        """Waits for the copy only; hands the token on."""
        if self._copied is not None:
            self._copied.synchronize()
        if streamer is not None:
            streamer.put(self._token.clone())
        return bool(self._finished.all())
