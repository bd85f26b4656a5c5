"""The dense model's own answers to prompts: what a pruned model will see when it generates, as calibration.

Text calibrates a model for reading what others wrote. When it generates, it reads what it has said itself, and errors
add up over an answer. RESP (arXiv 2512.02185) and RAC (arXiv 2509.12464) calibrate on such answers; RESP counts the
positions of the answer only, as is done here.

Answers are drawn from the model's own distribution, at temperature 1 without top-k and top-p. Then a pruned model's
log-perplexity on them is the dense model's entropy plus the divergence between the two, KL(dense ‖ pruned); and small
models do not run into the loops that they fall into when the likeliest token is always taken.
"""

from __future__ import annotations

import gc
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .. import checkpoint
from ..checkpoint.hashes import sha256_of
from ..errors import InputError
from ..families import family_of
from ..fast.ops.decode import MAX_TOKENS
from ..fast.runtime.generation import generate
from ..model.geometry import structure_of
from ..model.stream import Placement
from ..progress import Progress, silent
from ..text import Splits, Text
from ..timings import timed
from .evaluation.scoring import in_compute_dtype
from .prompts import FIELD, Prompts
from .run.settings import Settings

# Of the prompts, the share whose answers may be held out for evaluation.
_HELD_OUT = 0.25
# Keys and values of the sequences that are answered together, at most. A number and not what is free on the device: who
# is drawn together decides what is drawn.
_CACHE_BYTES = 8 << 30


@dataclass(frozen=True)
class OwnAnswers:
    """What is asked for: the prompts in ``text`` answered by the dense model, at most ``tokens`` tokens each, drawn at
    ``temperature``; at 0 each is the likeliest one. Raises ``InputError`` for numbers that are none."""

    text: Text
    tokens: int = 128
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise InputError("answer-tokens", self.tokens, "asks for no answer", "Use a whole number, at least 1")
        if not (isinstance(self.temperature, int | float) and 0 <= self.temperature < math.inf):
            remedy = "Use 0, or a positive number such as 0.6"
            raise InputError("answer-temperature", self.temperature, "is not a temperature", remedy)

    @classmethod
    def asked(cls, prompts: Any, tokens: int | None, temperature: float | None) -> OwnAnswers | None:
        """What the arguments of a fit ask for; None if there are no ``prompts``. Raises ``InputError``."""
        given = {"tokens": tokens, "temperature": temperature}
        given = {name: value for name, value in given.items() if value is not None}
        if prompts is not None:
            return cls(Text.of(prompts), **given)
        for name, value in given.items():
            problem = "is about own answers, and there are no prompts"
            raise InputError(f"answer-{name}", value, problem, "Give them with --own-answers")
        return None


@dataclass(frozen=True)
class _Row:
    """A prompt and its answer: ids of both, of which the answer begins at ``start``."""

    ids: list[int]
    start: int

    @property
    def tokens(self) -> int:
        """How many the answer has."""
        return len(self.ids) - self.start


class Answers:
    """The answers that ``asked`` asks of the checkpoint ``model``; generated when :meth:`splits` is called.

    ``settings`` say how many tokens are needed and which seed draws them. The same arguments give the same answers on
    the same kind of device.
    """

    def __init__(
        self, model: str | Path, asked: OwnAnswers, settings: Settings, device: torch.device,
        placement: Placement | None = None, progress: Progress = silent,
    ):  # fmt: skip
        self._model, self._asked, self._settings = model, asked, settings
        self._device, self._placement, self._progress = device, placement or Placement(), progress
        self.facts: dict[str, Any] = {}

    def identity(self, evaluates: bool) -> dict[str, Any]:
        """Equal for the same prompts, answered alike, whether these are also held out to evaluate. Of prompts that are
        no file, those are known which are needed in any case. Raises ``InputError`` for what is wrong with them."""
        text, settings = self._asked.text, self._settings
        if text.is_file:
            sha256 = sha256_of(text.path)
        else:
            needed = settings.calibration_tokens + (settings.evaluation_tokens if evaluates else 0)
            self._prompts.look(self._prompts_for(needed))
            sha256 = self._prompts.sha256
        read = {"form": text.form} if text.form else {}
        return {"sha256": sha256, "tokens": self._asked.tokens, "temperature": float(self._asked.temperature)} | read

    def splits(self, evaluates: bool) -> Splits:
        """Prompts with their answers as sequences, of which the answers are scored; without an evaluation part [0, 0]
        unless this ``evaluates``, too: then the last prompts, at most a quarter of them, are for that.

        Raises ``InputError`` for prompts that are wrong, for a model whose layers stream, and if nothing is answered.
        """
        settings = self._settings
        wanted = settings.calibration_tokens + (settings.evaluation_tokens if evaluates else 0)
        self._prompts.look(self._prompts_for(wanted))
        rows = self._generated(wanted)
        held = _last(rows, settings.evaluation_tokens) if evaluates else []
        calibration = _first(rows[: len(rows) - len(held)], settings.calibration_tokens)
        self.facts |= {
            "prompts": self._asked.text.name,
            "sha256": self._sha256,
            "read_as": self._prompts.read_as,
            "most_tokens": self._asked.tokens,
            "temperature": float(self._asked.temperature),
            "seed": settings.seed,
            "calibration": {"answers": len(calibration), "tokens": sum(row.tokens for row in calibration)},
            "evaluation": {"answers": len(held), "tokens": sum(row.tokens for row in held)},
        }
        ids, scored = _padded(calibration)
        return Splits(ids, _padded(held)[0], scored, _padded(held)[1] if evaluates else None)

    def _prompts_for(self, tokens: int) -> int:
        """How many prompts so many tokens of answers need at least."""
        return math.ceil(tokens / self._asked.tokens)

    @property
    def _sha256(self) -> str:
        """Of the file with the prompts, or of those that were read."""
        text = self._asked.text
        return sha256_of(text.path) if text.is_file else self._prompts.sha256

    @cached_property
    def _prompts(self) -> Prompts:
        length = self._settings.sequence_length
        longest = length - self._asked.tokens
        if longest < 1:
            problem = f"leaves no room for a prompt in sequences of {length} tokens"
            raise InputError("answer-tokens", self._asked.tokens, problem, "Use fewer, or a longer --sequence-length")
        return Prompts(self._model, self._asked.text, longest, length)

    @timed("answering")
    def _generated(self, wanted: int) -> list[_Row]:
        """Answered prompts in their order, until they have ``wanted`` tokens or there are no more."""
        rows, empty, done = [], 0, 0
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            model = self._opened()
            batch = self._together(model)
            torch.manual_seed(self._settings.seed)  # building a model has drawn, too
            while done < wanted and (prompts := self._prompts.take(min(batch, self._prompts_for(wanted - done)))):
                answers = _answers(model, prompts, self._asked)
                found = [_Row(p + a, len(p)) for p, a in zip(prompts, answers, strict=True) if a[0] not in _ends(model)]
                rows, empty = rows + found, empty + len(prompts) - len(found)
                done += sum(row.tokens for row in found)
                self._progress("answer", done, max(done, wanted))
        self._progress("answer", done, done)
        self.facts = {"left_out": empty, "together": batch, "dtype": str(model.dtype).removeprefix("torch.")}
        del model
        gc.collect()  # the runtime and its model know each other
        if not rows:
            problem = f"the model answers none of the {empty} prompts: it ends at once"
            remedy = "Give prompts that it goes on with, and chats to a model that chats"
            raise self._asked.text.refuse(FIELD, problem, remedy)
        return rows

    def _opened(self) -> PreTrainedModel:
        """The dense model for computing, on the device. Raises ``InputError`` if its layers would stream."""
        found = checkpoint.load_or_stream(self._model, self._device, "auto", self._placement)
        if not isinstance(found, PreTrainedModel):
            problem = "needs all weights on the device to generate, and these stream"
            remedy = "Use --weights gpu, a larger --gpu-memory-gb, or --text with answers from elsewhere"
            raise self._asked.text.refuse(FIELD, problem, remedy)
        model, tokenizer = in_compute_dtype(found), self._prompts.tokenizer
        # Ends are the model's own; how it is usually sampled is not asked here.
        configs = model.generation_config, model.config, tokenizer
        ends = [end for config in configs if (end := getattr(config, "eos_token_id", None)) is not None]
        flat = sorted({end for given in ends for end in (given if isinstance(given, list) else [given])})
        model.generation_config = GenerationConfig(eos_token_id=flat or None, pad_token_id=flat[0] if flat else 0)
        return model

    def _together(self, model: PreTrainedModel) -> int:
        """How many prompts are answered at once."""
        structure = structure_of(family_of(model.config.model_type), model.config)
        groups = sum(part.units for part in structure.attention)
        token = 2 * groups * structure.head_dim * model.dtype.itemsize
        return max(1, min(MAX_TOKENS, _CACHE_BYTES // (token * self._settings.sequence_length)))


def _answers(model: PreTrainedModel, prompts: list[list[int]], asked: OwnAnswers) -> list[list[int]]:
    """What the model answers to each prompt, up to the token that ends it and with it."""
    longest, pad = max(map(len, prompts)), model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    sampling = {"do_sample": True, "temperature": float(asked.temperature), "top_k": 0, "top_p": 1.0}
    how = sampling if asked.temperature else {"do_sample": False}
    given = generate(model, ids, attention_mask=seen, max_new_tokens=asked.tokens, **how)[:, longest:]
    ends = _ends(model)
    last = [next((at for at, id in enumerate(answer) if id in ends), len(answer)) for answer in given.tolist()]
    return [answer[: at + 1] for answer, at in zip(given.tolist(), last, strict=True)]


def _ends(model: PreTrainedModel) -> list[int]:
    return model.generation_config.eos_token_id or []


def _first(rows: list[_Row], tokens: int) -> list[_Row]:
    """The first rows with at most so many tokens of answers, but at least one."""
    total, count = 0, 0
    for row in rows:
        total += row.tokens
        if total > tokens and count:
            break
        count += 1
    return rows[:count]


def _last(rows: list[_Row], tokens: int) -> list[_Row]:
    """The last rows with so many tokens of answers, at most a quarter. Raises ``InputError`` if there is but one."""
    if len(rows) < 2:
        remedy = "Give more prompts, or a text to evaluate on with --eval-text"
        raise InputError(FIELD, "1 answer", "cannot both calibrate and be evaluated on", remedy)
    total, count, most = 0, 0, max(1, int(len(rows) * _HELD_OUT))
    while total < tokens and count < most:
        count += 1
        total += rows[-count].tokens
    return rows[-count:]


def _padded(rows: list[_Row]) -> tuple[Tensor, Tensor]:
    """Ids int64 [N, T], filled up behind the answers, where nothing looks; and bool [N, T], True for answers."""
    length = max((len(row.ids) for row in rows), default=0)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    scored = torch.zeros(len(rows), length, dtype=torch.bool)
    for at, row in enumerate(rows):
        ids[at, : len(row.ids)] = torch.tensor(row.ids)
        scored[at, row.start : len(row.ids)] = True
    return ids, scored
