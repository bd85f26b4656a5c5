"""Runs: whatever happens to one of their files, an answer is the undamaged run's, or refused."""

from __future__ import annotations

import random
from pathlib import Path

from . import children, trees
from .ground import FIT, Ground
from .judging import asked, judged
from .mutations import damage_file
from .outcomes import SILENT, SUCCESS, Verdict
from .writers import WRITERS, undisturbed

# One try in so many goes on with an unfinished fit: that computes for a second.
_RESUMES = 12


def attempt(ground: Ground, seed: int) -> Verdict:
    draw = random.Random(f"runs {seed}")
    name = "begun" if seed % _RESUMES == 0 else "run"
    with ground.scratch(name) as here:
        run = here / name
        file = draw.choice(sorted(path for path in run.rglob("*") if path.is_file() and "report" not in path.name))
        own = file.relative_to(run)
        stranger = ground / "other" / own
        what = f"{own.parent}/{damage_file(draw, file, stranger if stranger.is_file() else None)}"
        if name == "begun":
            return _resumed(ground, here, what)
        words = draw.choice(_readers(ground, str(own)))
        return asked(ground, words, here, f"{words[0]}: {what}")


def _readers(ground: Ground, name: str) -> tuple[tuple[object, ...], ...]:
    """The cheapest commands that read a file of a run."""
    policy, info = ("policy", "run", "--ratio", 0.3, "--json"), ("info", "run", "--json")
    prune = "prune", "run", "--policy", ground / "policy.json", "--output", "out", "--device", "cpu", "--json"
    timed = "policy", "run", "--latency-ms", float((ground / "latency.txt").read_text()), "--json"
    return {
        "run.json": (policy, policy, info, prune),
        "predictor.safetensors": (policy, policy, prune),
        "agent.safetensors": (policy,),
        "experience.sqlite": (info, info, prune),
        "profile.json": (timed,),
        "rounds.json": (info,),
    }.get(name, (prune,))


def _resumed(ground: Ground, here: Path, what: str) -> Verdict:
    """An unfinished fit goes on: to what it would have come to, or not at all."""
    words = "fit", ground / "model", "--text", ground / "text.txt", "--output", "begun", *FIT
    verdict = judged(children.run(children.command(*words), here), f"fit goes on: {what}")
    if verdict.outcome != SUCCESS:
        return verdict
    usual = undisturbed(WRITERS["fit"], ground).contents
    found = {name.replace("begun", "run", 1): digest for name, digest in trees.contents(here).items()}
    if differs := [name for name in trees.differing(usual, found) if name in usual]:
        return Verdict(SILENT, verdict.what, f"another {', '.join(differs)}"[:300])
    return verdict
