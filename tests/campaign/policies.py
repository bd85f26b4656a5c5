"""Policies as JSON: read for what they say, or refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from . import children
from .ground import Ground
from .judging import judged
from .mutations import byte_damage, dumped, json_damage
from .outcomes import SILENT, SUCCESS, Verdict

_FIELDS = ("format", "widths", "policy", "attention", "ffn", "experts", "__class__")
# So many tries prune; the others only read and check, which is what differs.
_PRUNES = 25


def attempt(ground: Ground, seed: int) -> Verdict:
    draw = random.Random(f"policies {seed}")
    with ground.scratch() as here:
        source = ground / draw.choice(("policy.json", "even.json", "pruned/ppf.json"))
        data, what = json_damage(draw, _unsealed(json.loads(source.read_text())), _FIELDS)
        content = dumped(draw, data)
        if draw.random() < 0.2:
            content, what = byte_damage(draw, source.read_bytes())
        file = here / "asked.json"
        file.write_bytes(content)
        if seed % _PRUNES == 0:
            words = "prune", ground / "run", "--policy", file, "--output", "out", "--device", "cpu"
            return judged(children.run(children.command(*words), here), f"prune --policy: {what}")
        verdict = judged(children.run(lambda: _read(ground, file), here), what)
        return _compared(verdict, content, here / "read.json")


def _unsealed(data: dict[str, Any]) -> dict[str, Any]:
    """Without what a whole ``ppf.json`` is known by: any damage would be refused for that, and the policy not read."""
    return {name: value for name, value in data.items() if name not in ("checksum", "headers")}


def _read(ground: Ground, file: Path) -> None:
    """What ``ppf prune --policy`` does with the file, ended as the command line ends it."""
    from ppf.deliver.results import read_policy
    from ppf.fitting.run import Run

    from .calls import as_a_command

    def read() -> None:
        policy = read_policy(file)
        Run(ground / "run").grid.check(policy)
        Path("read.json").write_text(json.dumps(policy.to_dict()["widths"]))

    as_a_command(read)


def _compared(verdict: Verdict, content: bytes, read: Path) -> Verdict:
    """A policy that was accepted must be the one in the file, to the type."""
    if verdict.outcome != SUCCESS:
        return verdict
    said = json.loads(content)
    said = said.get("policy", said)["widths"]
    if json.dumps(said) != read.read_text():
        return Verdict(SILENT, verdict.what, f"read as {read.read_text()[:200]}")
    return verdict
