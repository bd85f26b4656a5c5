"""Checkpoints of strangers: config, headers, index, shards, tokenizer. Nobody can say what an honest weight is; but
whatever a folder holds, it is opened or refused, and refused before it costs anything."""

from __future__ import annotations

import random
from pathlib import Path

from . import children
from .calls import as_a_command
from .ground import FAMILIES, Ground
from .judging import judged, refused_cheaply
from .mutations import damage_file
from .outcomes import Verdict

# What a model may come with beside its own files.
_GENERATION = "generation_config.json"


def attempt(ground: Ground, seed: int) -> Verdict:
    draw = random.Random(f"checkpoints {seed}")
    name = draw.choice(("model", "sharded", *FAMILIES, "pruned", "even"))
    with ground.scratch(name) as here:
        folder = here / name
        first, second = _chosen(draw, folder), _chosen(draw, folder)
        what = damage_file(draw, first)
        if draw.random() < 0.1 and second != first:
            what += "; " + damage_file(draw, second)
        asked = draw.choice(("info", "info", "open", "open", "tokenizer"))
        work = children.command("info", name) if asked == "info" else lambda: _open(folder, asked)
        ended = children.run(work, here)
        return refused_cheaply(ended, judged(ended, f"{asked} of {name}, {what}"))


def _chosen(draw: random.Random, folder: Path) -> Path:
    """A file: settings more often than weights, of which most bits are as good as others."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    weights = [5 if path.suffix == ".json" and path.name != "ppf.json" else 3 for path in files]
    return draw.choices(files, weights)[0]


def _open(folder: Path, what: str) -> None:
    """What every command does first with a model, and one pass."""
    import torch

    import ppf
    from ppf.checkpoint import load_tokenizer

    def work() -> None:
        if what == "tokenizer":
            assert load_tokenizer(folder)("the old river")["input_ids"] is not None
            return
        with torch.no_grad():
            ppf.load(folder, "cpu")(torch.tensor([[3, 5, 7, 11]]))

    as_a_command(work)
