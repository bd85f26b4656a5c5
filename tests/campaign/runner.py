"""Tries, one after the other, in as many processes as there are cores for."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from .attacks import ATTACKS
from .ground import Ground
from .outcomes import Try

Name = tuple[str, int]
_EVERY = 30.0


def made(ground: Ground, attack: str, seed: int) -> Try:
    """Make one try."""
    before = _computed()
    verdict = ATTACKS[attack].attempt(ground, seed)
    return Try(attack, seed, verdict.outcome, verdict.what, verdict.detail, round(_computed() - before, 3))


def _computed() -> float:
    """Seconds that children of this process have computed for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def made_by_several(ground: Ground, names: Sequence[Name], processes: int) -> list[Try]:
    """Make all tries, dealt out to so many processes; says on standard error how far they are."""
    readers, workers = [], []
    for number in range(processes):
        reading, writing = os.pipe()
        workers.append(os.fork())
        if workers[-1] == 0:
            os.close(reading)
            _work(ground, names[number::processes], writing)
        os.close(writing)
        readers.append(os.fdopen(reading))
    tries = list(_heard(_lines(readers), len(names)))
    for worker in workers:
        os.waitpid(worker, 0)
    return tries


def _work(ground: Ground, names: Sequence[Name], writing: int) -> None:
    code = 1
    try:
        with os.fdopen(writing, "w") as out:
            for attack, seed in names:
                print(json.dumps(made(ground, attack, seed).to_dict()), file=out, flush=True)
        code = 0
    except BaseException:
        print(f"python -m tests.campaign --only {attack} --seed {seed}", file=sys.stderr)
        traceback.print_exc()
    finally:
        os._exit(code)


def _lines(readers: list) -> Iterator[str]:
    import selectors

    with selectors.DefaultSelector() as waiting:
        for reader in readers:
            waiting.register(reader, selectors.EVENT_READ)
        while waiting.get_map():
            for key, _ in waiting.select():
                # A worker writes whole lines.
                if line := key.fileobj.readline():
                    yield line
                else:
                    waiting.unregister(key.fileobj)


def _heard(lines: Iterator[str], expected: int) -> Iterator[Try]:
    told, count, faults = time.monotonic(), 0, 0
    for line in lines:
        one = Try(**json.loads(line))
        count, faults = count + 1, faults + one.is_fault
        if one.is_fault:
            print(shown(one), file=sys.stderr, flush=True)
        if time.monotonic() - told > _EVERY:
            told = time.monotonic()
            print(f"{count:,} of {expected:,} tries, {faults} faults", file=sys.stderr, flush=True)
        yield one
    if count != expected:
        raise RuntimeError(f"the campaign itself failed: {count} of {expected} tries were made")


def shown(one: Try) -> str:
    """A try for people."""
    text = f"{one.outcome}: {one.what}\n    {one.detail}\n    {one.command}"
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def write(path: Path, tries: Sequence[Try]) -> None:
    path.write_text("".join(json.dumps(one.to_dict()) + "\n" for one in tries))
