"""What stands in a folder, in a form that two commands that did the same agree on: without times and places."""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from pathlib import Path
from typing import Any

from safetensors import safe_open

# Fields that differ between two runs of the same command: how long something took, and checksums of that.
_TIMES = re.compile(r"seconds|timings|latency|created|per_second|constant|profiles|checksum|seals")
# Files whose SHA-256 holds such times, or an order of metadata.
_TIMED = (".json", ".sqlite", ".html", ".safetensors")
_ROWS = "SELECT policy, log_perplexity, ratio, round, source FROM evaluations ORDER BY id"


def names(folder: Path) -> set[str]:
    """Every file and folder below ``folder``, but SQLite's own beside a database."""
    found = (path for path in folder.rglob("*") if not path.name.endswith(("-wal", "-shm")))
    return {str(path.relative_to(folder)) for path in found}


def contents(folder: Path, *places: Path) -> dict[str, str]:
    """A digest of every file below ``folder``; ``places`` are folders whose names may stand in files."""
    files = (name for name in sorted(names(folder)) if (folder / name).is_file())
    return {name: _digest(folder / name, (folder, *places)) for name in files}


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names whose content is not the same, or that stand on one side only."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def timeless(data: Any) -> Any:
    """JSON without what took how long."""
    if isinstance(data, dict):
        kept = {name: value for name, value in data.items() if not _TIMES.search(str(name))}
        return {name: timeless(value) for name, value in kept.items() if not str(name).endswith(_TIMED)}
    return [timeless(value) for value in data] if isinstance(data, list) else data


def _digest(path: Path, places: tuple[Path, ...]) -> str:
    if path.suffix == ".html":  # figures of time are anywhere in it
        return "a page"
    if path.suffix == ".json":
        content = json.dumps(timeless(json.loads(path.read_bytes())), sort_keys=True)
    elif path.suffix == ".sqlite":
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            content = repr(database.execute(_ROWS).fetchall())
    elif path.suffix == ".safetensors":
        content = _tensors(path)
    else:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    for place in places:
        content = content.replace(str(place), "…")
    return hashlib.sha256(content.encode()).hexdigest()


def _tensors(path: Path) -> str:
    """Metadata may hold times; tensors may not."""
    with safe_open(path, framework="np") as opened:
        held = {name: opened.get_tensor(name) for name in sorted(opened.keys())}  # noqa: SIM118  (no mapping)
    return repr([(name, a.dtype.str, a.shape, hashlib.sha256(a.tobytes()).hexdigest()) for name, a in held.items()])
