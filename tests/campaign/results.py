"""Results: a pruned checkpoint whose files were damaged is exported and trained as it was written, or not at all; and
runs opened as elastic models."""

from __future__ import annotations

import json
import random
from pathlib import Path

from . import children, trees
from .calls import as_a_command
from .ground import Ground
from .judging import asked, judged
from .mutations import damage_file
from .outcomes import SILENT, SUCCESS, Verdict
from .writers import WRITERS, undisturbed


def attempt(ground: Ground, seed: int) -> Verdict:
    draw = random.Random(f"results {seed}")
    if seed % 5 == 0:
        return _elastic(ground, draw)
    with ground.scratch("pruned") as here:
        folder = here / "pruned"
        file = draw.choice([*sorted(path for path in folder.iterdir() if path.is_file()), *[folder / "ppf.json"] * 4])
        what = damage_file(draw, file, ground / "changeling" / file.name)
        return draw.choice((_info, _export, _export))(ground, here, what)


def _info(ground: Ground, here: Path, what: str) -> Verdict:
    if not (here / "pruned" / "ppf.json").exists():  # a checkpoint like any other
        return judged(children.run(children.command("info", "pruned"), here), f"info: {what}")
    return asked(ground, ("info", "pruned", "--json"), here, f"info: {what}")


def _export(ground: Ground, here: Path, what: str) -> Verdict:
    words = "export", "pruned", "--to", "hf", "--self-contained", "--output", "out"
    verdict = judged(children.run(children.command(*words), here), f"export: {what}")
    if verdict.outcome != SUCCESS or _is_said_to_be_other(here / "out"):
        return verdict
    usual = undisturbed(WRITERS["export hf"], ground).contents
    found = trees.contents(here, ground.folder)
    differs = [name for name in usual if found.get(name) != usual[name] and not name.endswith("ppf.json")]
    if differs and (here / "pruned" / "ppf.json").exists():
        return Verdict(SILENT, verdict.what, f"another {', '.join(differs)}"[:300])
    return verdict


def _is_said_to_be_other(folder: Path) -> bool:
    """Whether the report of an export says that other software saved the weights: they were trained, say."""
    return json.loads((folder / "ppf.json").read_text()).get("saved_again") is True


def _elastic(ground: Ground, draw: random.Random) -> Verdict:
    """One model of any size, made from a run: its logits at half the size."""
    with ground.scratch("run") as here:
        wanted = ("run.json", "agent.safetensors", "statistics/*", "library/*")
        files = [file for pattern in wanted for file in sorted((here / "run").glob(pattern))]
        file = draw.choice(files)
        stranger = ground / "other" / file.relative_to(here / "run")
        what = f"elastic: {damage_file(draw, file, stranger)}"
        ended = children.run(lambda: _logits(here / "run"), here)
        verdict = judged(ended, what)
        if verdict.outcome == SUCCESS and ended.out != _usual_logits(ground):
            return Verdict(SILENT, what, "other logits")
        return verdict


_KNOWN: dict[Ground, str] = {}


def _usual_logits(ground: Ground) -> str:
    if ground not in _KNOWN:
        ended = children.run(lambda: _logits(ground / "run"), ground.folder)
        if ended.code != 0:
            raise RuntimeError(f"the undamaged run is no elastic model: {ended.err}")
        _KNOWN[ground] = ended.out
    return _KNOWN[ground]


def _logits(run: Path) -> None:
    import torch

    import ppf

    def work() -> None:
        model = ppf.load(run, "cpu", elastic=True)
        model.set_ratio(0.5)
        with torch.no_grad():
            print(model(torch.tensor([[3, 5, 7, 11]])).logits.double().sum().item())

    as_a_command(work)
