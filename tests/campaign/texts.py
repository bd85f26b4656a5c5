"""Texts in every form, broken in every way: read as they are, or refused."""

from __future__ import annotations

import gzip
import json
import os
import random
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

from . import children
from .ground import Ground
from .judging import judged
from .mutations import byte_damage
from .outcomes import SILENT, SUCCESS, Verdict

# Forms with a checksum: what is read of a damaged one is all of it, or nothing.
_CHECKED = ("gz", "zst")


def attempt(ground: Ground, seed: int) -> Verdict:
    draw = random.Random(f"texts {seed}")
    form = draw.choice(tuple(_FORMS))
    content, how = _FORMS[form](ground), "whole"
    if draw.random() < 0.8:
        content, how = byte_damage(draw, content)
    suffix = draw.choice((form,) * 9 + ("txt", "json", "bin"))
    way = draw.choice(("file",) * 8 + ("pipe", "stdin", "folder"))
    with ground.scratch() as here:
        file = here / f"asked.{suffix}"
        words = ["eval", ground / "model", "--text", file, *_QUICK]
        words += draw.choice(([], [], [], ["--field", "text"], ["--field", "a\x1b[2J"], ["--split", "train"]))
        what = f"{form} as .{suffix} by {way}, {how} {' '.join(map(str, words[4 + len(_QUICK) :]))}"
        ended = _WAYS[way](words, file, content, here)
        verdict = judged(ended, what)
        if verdict.outcome == SUCCESS and form in _CHECKED and suffix == form and ended.out != "":
            usual = _perplexity(ground, form)
            if _figure(ended.out) != usual and how != "whole" and _starts_alike(content, _FORMS[form](ground)):
                return Verdict(SILENT, what, f"{_figure(ended.out)}, not {usual}")
        return verdict


_QUICK = "--sequence-length", 32, "--tokens", 256, "--device", "cpu", "--json"


def _figure(out: str) -> float:
    return json.loads(out)["log_perplexity"]


def _starts_alike(one: bytes, other: bytes) -> bool:
    """Whether it is still what it was, and not another file altogether."""
    return one[:4] == other[:4]


@cache
def _perplexity(ground: Ground, form: str) -> float:
    with ground.scratch() as here:
        file = here / f"asked.{form}"
        file.write_bytes(_FORMS[form](ground))
        return _figure(children.run(children.command("eval", ground / "model", "--text", file, *_QUICK), here).out)


def _lines(ground: Ground) -> list[dict[str, object]]:
    words = (ground / "test.txt").read_text().split()
    return [{"text": " ".join(words[i : i + 40]), "id": i} for i in range(0, 1200, 40)]


def _plain(ground: Ground) -> bytes:
    return (ground / "test.txt").read_bytes()[:8000]


def _jsonl(ground: Ground) -> bytes:
    return "\n".join(json.dumps(line) for line in _lines(ground)).encode()


def _zst(ground: Ground) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=True).compress(_plain(ground))


@cache
def _parquet(ground: Ground) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(_lines(ground)), sink)
    return sink.getvalue().to_pybytes()


_FORMS: dict[str, Callable[[Ground], bytes]] = {
    "txt": _plain,
    "jsonl": _jsonl,
    "json": lambda ground: json.dumps(_lines(ground)).encode(),
    "gz": lambda ground: gzip.compress(_plain(ground), mtime=0),
    "jsonl.gz": lambda ground: gzip.compress(_jsonl(ground), mtime=0),
    "zst": _zst,
    "parquet": _parquet,
    "md": lambda ground: b"\xef\xbb\xbf" + _plain(ground),
    "csv": lambda ground: _plain(ground).decode().encode("utf-16"),
    "log": lambda ground: _plain(ground)[:3000] + "\ud7ff\U0010ffff\u202e\x1b[2J".encode() * 50,
}


def _by_file(words: list[object], file: Path, content: bytes, here: Path) -> children.Ended:
    file.write_bytes(content)
    return children.run(children.command(*words), here)


def _by_folder(words: list[object], file: Path, content: bytes, here: Path) -> children.Ended:
    (here / "texts").mkdir()
    (here / "texts" / file.name).write_bytes(content)
    words[words.index(file)] = here / "texts"
    return children.run(children.command(*words), here)


def _by_pipe(words: list[object], file: Path, content: bytes, here: Path) -> children.Ended:
    os.mkfifo(file)
    child = children.Child(children.command(*words), here)
    writer = threading.Thread(target=_feed, args=(file, content), daemon=True)
    writer.start()
    ended = child.wait()
    _release(file)
    writer.join()
    return ended


def _feed(file: Path, content: bytes) -> None:
    try:
        with open(file, "wb") as pipe:
            pipe.write(content)
    except OSError:  # nobody reads on
        pass


def _release(file: Path) -> None:
    """Let go of a writer that nobody has read from."""
    os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK))


def _by_stdin(words: list[object], file: Path, content: bytes, here: Path) -> children.Ended:
    words[words.index(file)] = "-"
    file.write_bytes(content)
    return children.run(children.command(*words), here, lambda: os.dup2(os.open(file, os.O_RDONLY), 0))


_WAYS = {"file": _by_file, "pipe": _by_pipe, "stdin": _by_stdin, "folder": _by_folder}
