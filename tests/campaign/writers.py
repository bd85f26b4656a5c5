"""The commands that write, as they are killed, raced and run out of space; and what an undisturbed one leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from ppf.storage.files import write_json

from . import children, trees
from .ground import FIT, PROFILE, Ground

_CPU = "--device", "cpu"
_RECOVER = "--tokens", 512, "--sequence-length", 32, "--batch-tokens", 128, "--method"
_COMPARE = "--methods", "uniform,dynamic,static:3,flap", "--ratios", "0.3,0.5", "--tokens", 256


@dataclass(frozen=True)
class Writer:
    """A command that writes: what of the ground it ``changes``, and its words; @name stands for the ground's. One that
    ``learns`` goes on from what a killed one had measured: it need not come to the same."""

    name: str
    words: tuple[object, ...]
    changes: tuple[str, ...] = ()
    learns: bool = False

    def work(self, ground: Ground) -> Callable[[], None]:
        """What a child does in a folder that holds copies of ``changes``."""
        return children.command(*(_placed(word, ground) for word in self.words))


def _placed(word: object, ground: Ground) -> object:
    return ground / word[1:] if isinstance(word, str) and word.startswith("@") else word


WRITERS = {
    writer.name: writer
    for writer in (
        Writer("fit", ("fit", "@model", "--text", "@text.txt", "--output", "run", *FIT)),
        Writer("prune", ("prune", "run", "--ratio", 0.3, "--output", "out", *_CPU), ("run",)),
        Writer(
            "prune --search", ("prune", "run", "--ratio", 0.4, "--search", 4, "--output", "out", *_CPU), ("run",), True
        ),
        Writer(
            "prune --force", ("prune", "run", "--ratio", 0.3, "--output", "even", "--force", *_CPU), ("run", "even")
        ),
        Writer("recover", ("recover", "@pruned", "--text", "@text.txt", "--output", "out", *_RECOVER, "full", *_CPU)),
        Writer(
            "recover norms", ("recover", "@pruned", "--text", "@text.txt", "--output", "out", *_RECOVER, "norms", *_CPU)
        ),
        Writer("export hf", ("export", "@pruned", "--to", "hf", "--self-contained", "--output", "out")),
        Writer("export gguf", ("export", "@even", "--to", "gguf", "--output", "out")),
        Writer("export vllm", ("export", "@even", "--to", "vllm", "--output", "out")),
        Writer("export deci", ("export", "@wide", "--to", "deci", "--output", "out")),
        Writer("compare", ("compare", "run", "--text", "@test.txt", "--output", "out", *_COMPARE, *_CPU), ("run",)),
        Writer("report", ("report", "run", "--held-out", 20, *_CPU), ("run",)),
        Writer("report elsewhere", ("report", "run", "--held-out", 20, "--output", "out", *_CPU), ("run",)),
        Writer("profile", ("profile", "run", *PROFILE), ("run",)),
        Writer("pareto", ("pareto", "run"), ("run",)),
    )
}


@dataclass(frozen=True)
class Undisturbed:
    """What a writer leaves when nothing disturbs it: names and contents of a scratch folder; how many calls of each
    kind it makes, and how long it computes."""

    names: list[str]
    contents: dict[str, str]
    calls: dict[str, int]
    seconds: float


@cache
def undisturbed(writer: Writer, ground: Ground) -> Undisturbed:
    """Found once by running it twice: what differs then would differ after a kill as well."""
    known = ground.folder.parent / f"{writer.name}.json"
    if not known.exists():
        write_json(known, asdict(_found(writer, ground)))
    return Undisturbed(**json.loads(known.read_text()))


def _found(writer: Writer, ground: Ground) -> Undisturbed:
    first, second = _run(writer, ground), _run(writer, ground)
    if differs := trees.differing(first.contents, second.contents):
        raise RuntimeError(f"{writer.name} does not give the same twice: {differs}")
    return second


def _run(writer: Writer, ground: Ground) -> Undisturbed:
    with ground.scratch(*writer.changes) as here:
        file = here.parent / "calls"
        ended = children.run(lambda: children.count_calls(file, writer.work(ground)), here)
        if ended.code != 0:
            raise RuntimeError(f"{writer.name} fails undisturbed: {ended.err}")
        calls = dict(zip(children.KINDS, map(int, file.read_text().split()), strict=True))
        return Undisturbed(sorted(trees.names(here)), trees.contents(here), calls, ended.seconds)


def run_again(writer: Writer, ground: Ground, here: Path) -> children.Ended:
    """The same command in the same folder."""
    return children.run(writer.work(ground), here)
