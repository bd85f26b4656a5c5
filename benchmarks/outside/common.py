"""What the scripts beside this one share: arguments, texts, the count of what was removed, perplexity, one JSON a tool.

It needs torch and transformers only, so that it runs in the environment of any tool. A result is scored by ``ppf eval``
on the folder that ``save_pretrained`` wrote or, if that cannot be opened again, in memory by the same protocol
(tests/test_outside.py compares the two): the first N tokens of the text by the model's own tokenizer without special
tokens, in sequences that are each scored on their own from their second token on, in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

RATIOS = 0.1, 0.2, 0.3
# Behind the last token that is scored, so that a word is not cut where its tokens depend on it.
_SPARE_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """What a method is given: the ratio asked, the tokenizer, calibration int64 [N, T], and where to compute."""

    ratio: float
    tokenizer: Any
    calibration: Tensor
    device: str


Method = Callable[[nn.Module, Case], nn.Module]


def parser(text: str) -> argparse.ArgumentParser:
    """The arguments of every script; ``text`` is its docstring."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "test"):
        made.add_argument(name, type=Path, metavar=name.upper())
    made.add_argument("--output", type=Path, required=True, help="JSON; rows of the same method and ratio are replaced")
    made.add_argument("--device", default="cpu")
    made.add_argument("--ratio", type=float, action="append", help="share of the decoder's projections to remove")
    for name, value in (("tokens", 8_192), ("length", 1_024), ("calibration-tokens", 32_768)):
        made.add_argument(f"--{name}", type=int, default=value)
    made.add_argument("--ppf", default="ppf", help="the program ppf, of any environment")
    made.add_argument("--note", help="what else is to be known, such as that others use the machine too")
    return made


def _head(tokenizer: Any, path: Path, tokens: int) -> Any:
    """The text's beginning, tokenized: at least ``tokens`` and some to spare, if there are so many."""
    text, size = path.read_text(encoding="utf-8"), 4 * (tokens + _SPARE_TOKENS)
    while True:
        found = tokenizer(text[:size], add_special_tokens=False, return_offsets_mapping=True)
        if size >= len(text) or len(found["input_ids"]) > tokens + 2 * _SPARE_TOKENS:
            return found
        size *= 2


def sequences(tokenizer: Any, path: Path, tokens: int, length: int) -> Tensor:
    """The first ``tokens`` tokens of a text, int64 [tokens // length, length]."""
    ids, count = _head(tokenizer, path, tokens)["input_ids"], tokens // length
    if len(ids) < count * length:
        raise SystemExit(f"{path} has {len(ids):,} tokens, fewer than {count * length:,}")
    return torch.tensor(ids[: count * length]).reshape(count, length)


def beginning(tokenizer: Any, path: Path, tokens: int) -> str:
    """The text's first characters, whose first ``tokens`` tokens are its own."""
    ends = _head(tokenizer, path, tokens)["offset_mapping"]
    return path.read_text(encoding="utf-8")[: ends[min(tokens + _SPARE_TOKENS, len(ends)) - 1][1]]


def decoder_parameters(model: nn.Module) -> int:
    """Weights and biases of the linear projections in the decoder's layers. Norms, of which nothing but whole layers is
    ever removed, are left out, as PPF's ratios leave them out; so are embeddings and head."""
    linear = (m for m in model.get_decoder().layers.modules() if isinstance(m, nn.Linear))
    return sum(p.numel() for module in linear for p in module.parameters(recurse=False))


def ffn_share(model: nn.Module) -> float:
    """The part of :func:`decoder_parameters` that is the FFNs'."""
    linear = (m for layer in model.get_decoder().layers for m in layer.mlp.modules() if isinstance(m, nn.Linear))
    return sum(p.numel() for module in linear for p in module.parameters(recurse=False)) / decoder_parameters(model)


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor) -> float:
    """Of int64 ``tokens`` [N, T], each sequence on its own, from its second token on."""
    total, device = 0.0, next(model.parameters()).device
    for row in tokens.to(device).split(1):
        logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        total += functional.cross_entropy(logits, row[0, 1:], reduction="sum").double().item()
    return math.exp(total / tokens[:, 1:].numel())


def by_ppf(ppf: str, folder: Path, text: Path, length: int, device: str) -> dict[str, Any]:
    """What ``ppf eval`` says of a folder: {"perplexity", "tokens"}, or {"not_reloaded": why}."""
    words = [ppf, "eval", folder, "--text", text, "--sequence-length", length, "--device", device, "--json"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"not_reloaded": told.replace(str(folder), folder.name)}
    told = json.loads(done.stdout)
    return {"perplexity": told["perplexity"], "tokens": told["protocol"]["tokens"]}


def loaded(folder: Path, device: str) -> nn.Module:
    """The dense model, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def machine(device: str) -> str:
    """For people: what it was computed on."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"{os.cpu_count()} CPU cores"


def circumstances(asked: argparse.Namespace, packages: Sequence[str]) -> dict[str, Any]:
    """Model, texts, protocol, machine, versions and date."""
    return {
        "model": asked.model.name,
        "calibration": {"text": asked.calibration.name, "tokens": asked.calibration_tokens},
        "test": {"text": asked.test.name, "tokens": asked.tokens, "sequence_length": asked.length},
        "machine": machine(asked.device),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", *packages)},
        "date": datetime.now(UTC).date().isoformat(),
    } | ({"note": asked.note} if asked.note else {})  # fmt: skip


class Results:
    """The JSON of a tool, written after every row. More rows may be added under the same circumstances; those that are
    measured again replace the old ones."""

    def __init__(self, asked: argparse.Namespace, packages: Sequence[str]) -> None:
        self.path = asked.output
        self.data = circumstances(asked, packages)
        old = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        if differing := [name for name in old if name in self.data and old[name] != self.data[name]]:
            raise SystemExit(
                f"{self.path} was measured under other circumstances ({', '.join(differing)}): move it away"
            )
        self.data = old | self.data | {"rows": old.get("rows", [])}

    def add(self, row: dict[str, Any]) -> None:
        """One more row; also on standard output."""
        key = row["method"], row["asked"]
        kept = [old for old in self.data["rows"] if (old["method"], old["asked"]) != key]
        self.data["rows"] = sorted([*kept, row], key=lambda r: (r["method"], r["asked"]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row), flush=True)


class Scorer:
    """Scores models on the beginning of the test text; ``folder`` is for scratch."""

    def __init__(self, asked: argparse.Namespace, tokenizer: Any, folder: Path) -> None:
        self.asked, self.text = asked, folder / "test.txt"
        self.tokens = sequences(tokenizer, asked.test, asked.tokens, asked.length)
        self.text.write_text(beginning(tokenizer, asked.test, asked.tokens), encoding="utf-8")
        self.before = decoder_parameters(loaded(asked.model, "cpu"))

    def dense(self) -> dict[str, Any]:
        """What there is before anything is removed."""
        return {"decoder_parameters": self.before} | self._score(self.asked.model)

    def row(self, model: nn.Module, saved: Path) -> dict[str, Any]:
        """Of a result, which was ``saved``, too."""
        found = {"removed": 1 - decoder_parameters(model) / self.before} | self._score(saved)
        if "not_reloaded" in found:
            found |= {"perplexity": perplexity(model, self.tokens), "tokens": self.tokens.numel()}
        return found

    def _score(self, folder: Path) -> dict[str, Any]:
        found = by_ppf(self.asked.ppf, folder, self.text, self.asked.length, self.asked.device)
        if found.get("tokens", self.tokens.numel()) != self.tokens.numel():
            raise SystemExit(f"ppf eval took {found['tokens']} tokens of {self.text}, not {self.tokens.numel()}")
        return found


def measure(asked: argparse.Namespace, methods: Mapping[str, Method], packages: Sequence[str]) -> None:
    """Every method at every ratio, from a fresh dense model each time."""
    tokenizer, results = AutoTokenizer.from_pretrained(asked.model), Results(asked, packages)
    calibration = sequences(tokenizer, asked.calibration, asked.calibration_tokens, asked.length)
    with tempfile.TemporaryDirectory(prefix="outside-") as folder:
        scorer = Scorer(asked, tokenizer, Path(folder))
        results.data["dense"] = scorer.dense()
        print(json.dumps(results.data["dense"]), flush=True)
        for name, ratio in ((name, ratio) for name in methods for ratio in asked.ratio or RATIOS):
            torch.manual_seed(0)
            model, start = loaded(asked.model, asked.device), time.perf_counter()
            model = methods[name](model, Case(ratio, tokenizer, calibration, asked.device)).eval()
            seconds, saved = time.perf_counter() - start, Path(folder) / f"{name} {ratio}"
            model.save_pretrained(saved)
            tokenizer.save_pretrained(saved)
            results.add({"method": name, "asked": ratio, "seconds": seconds} | scorer.row(model, saved))
