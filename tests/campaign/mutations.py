"""Damage: to bytes, to JSON, to files. Everything is drawn from the ``random.Random`` that is given."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

_DEEP: list[Any] = []
for _ in range(100):
    _DEEP = [_DEEP]

VALUES = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 8, 64, 10**6, 10**12, 2**31, 2**63, 10**30, -(10**12)),
    *(0.0, 0.5, -1.5, 1.0, 3.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "0", "four", "x" * 5000, "\x1b[2J\x1b]0;title\x07", "\u202egnp", "\ud800", "a\nb", "../../etc/passwd"),
    *([], [1], [[[[]]]], [0] * 4, [3, 3, 3, 3], ["3"] * 4, [None], {}, {"a": 1}, {"0": 5}, {"0": {}}, _DEEP),
)
"""What stands where nobody means well."""
_HARMS = "zeros", "nan", "huge", "another value", "cut", "another type", "dropped", "renamed", "shuffled"
_TEXTS = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b"{}{}",
    b"\x00" * 64,
    b"NaN",
    b'{"a":1,"a":2}',
)


def json_damage(draw: random.Random, data: Any, fields: tuple[str, ...] = ()) -> tuple[Any, str]:
    """``data`` with one to three values, at any depth, added, removed, doubled or given another value; and where."""
    data, places = copy.deepcopy(data), []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        data, place = _one_change(draw, data, fields)
        places.append(place)
    return data, ", ".join(places)


def _one_change(draw: random.Random, data: Any, fields: tuple[str, ...]) -> tuple[Any, str]:
    paths = [()] if draw.random() < 0.02 else list(_paths(data))
    path = draw.choice(paths or [()])
    value = copy.deepcopy(draw.choice(VALUES))
    if not path:
        return value, "everything"
    place = data
    for step in path[:-1]:
        place = place[step]
    name, chance = path[-1], draw.random()
    if isinstance(place, dict) and fields and chance < 0.2:
        name = draw.choice(fields)
        place[name] = value
    elif chance < 0.35:
        del place[name]
    elif chance < 0.45 and isinstance(place, list):
        place.insert(name, copy.deepcopy(place[draw.randrange(len(place))]))
    elif chance < 0.65 and isinstance(place[name], (int, float)) and not isinstance(place[name], bool):
        place[name] = place[name] + draw.choice((1, -1, 0.5, 1000, -1000))
    else:
        place[name] = value
    return data, ".".join(map(str, (*path[:-1], name)))


def _paths(data: Any, before: tuple[Any, ...] = ()) -> Any:
    """The ways to every value in JSON; of long lists the first and the last few."""
    if isinstance(data, dict):
        items = list(data.items())
    elif isinstance(data, list):
        items = list(enumerate(data))
    else:
        return
    for name, value in items if len(items) < 40 else items[:20] + items[-5:]:
        yield (*before, name)
        yield from _paths(value, (*before, name))


def dumped(draw: random.Random, data: Any) -> bytes:
    """JSON as one of the ways to write it."""
    text = json.dumps(data, indent=draw.choice((None, 2)), ensure_ascii=True)
    encoding = draw.choice(("utf-8",) * 8 + ("utf-8-sig", "utf-16"))
    return text.encode(encoding)


def byte_damage(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    """Flipped bits, a cut, zeros, something else in the middle or at the end."""
    kind = draw.choice(("flip", "flip", "flip", "header flip", "cut", "zeros", "ones", "insert", "append", "other"))
    at = draw.randrange(len(data)) if data else 0
    if kind in ("flip", "header flip") and data:
        at = at if kind == "flip" else at % 64
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :], f"{kind} at {at}"
    if kind == "cut":
        return data[:at], f"cut to {at}"
    if kind in ("zeros", "ones"):
        size = min(len(data) - at, draw.choice((1, 8, 512, 10**9)))
        return data[:at] + (b"\x00" if kind == "zeros" else b"\xff") * size + data[
            at + size :
        ], f"{size} {kind} at {at}"
    noise = draw.randbytes(draw.choice((1, 8, 4096)))
    if kind == "insert":
        return data[:at] + noise + data[at:], f"{len(noise)} bytes inserted at {at}"
    if kind == "append":
        return data + noise, f"{len(noise)} bytes appended"
    return draw.choice((*_TEXTS, noise)), "another content"


def damage_file(draw: random.Random, file: Path, stranger: Path | None = None) -> str:
    """Damage ``file`` in one of the ways in which files come to harm; returns how. ``stranger`` is the same file of
    another folder."""
    ways: list[Callable[[random.Random, Path], str]] = [_bytes, _bytes, _bytes]
    if file.suffix == ".json":
        ways += [_json] * 5
    if file.suffix == ".safetensors":
        ways += [_tensors] * 3
    if stranger is not None:
        ways += [lambda _, target: _taken_from(stranger, target)] * 2
    ways += [_gone, _place]
    return f"{file.name}: {draw.choice(ways)(draw, file)}"


def _bytes(draw: random.Random, file: Path) -> str:
    data, how = byte_damage(draw, file.read_bytes())
    file.write_bytes(data)
    return how


def _json(draw: random.Random, file: Path) -> str:
    data, where = json_damage(draw, json.loads(file.read_bytes()))
    file.write_bytes(dumped(draw, data))
    return f"changed {where}"


def _tensors(draw: random.Random, file: Path) -> str:
    """Written well, with other values, shapes or names; by somebody who keeps the metadata, or by other software."""
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() if draw.random() < 0.7 else None
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    how = draw.choice(_HARMS)
    tensors[name] = _changed(draw, tensor, how)
    if how in ("dropped", "renamed"):
        del tensors[name]
    if how == "renamed":
        tensors[f"{name}x"] = tensor
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata)
    return f"{name} {how}{'' if metadata else ', saved by other software'}"


def _changed(draw: random.Random, tensor: torch.Tensor, how: str) -> torch.Tensor:
    flat = tensor.clone().flatten()
    if how == "zeros":
        flat.zero_()
    elif how == "nan" and tensor.is_floating_point() and len(flat):
        flat[draw.randrange(len(flat))] = float("nan")
    elif how == "huge" and len(flat):
        flat[draw.randrange(len(flat))] = 2**30
    elif how == "another value" and len(flat):
        flat[draw.randrange(len(flat))] += 1
    elif how == "cut":
        return flat[:-1]
    elif how == "another type":
        return tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.int32)
    elif how == "shuffled":
        flat = flat.flip(0)
    return flat.reshape(tensor.shape)


def _taken_from(stranger: Path, file: Path) -> str:
    shutil.copyfile(stranger, file)
    return f"that of {stranger.parent}"


def _gone(draw: random.Random, file: Path) -> str:
    file.unlink()
    return "gone"


def _place(draw: random.Random, file: Path) -> str:
    """Something else under its name."""
    file.unlink()
    how = draw.choice(("a folder", "a link to itself", "a broken link", "a pipe", "empty"))
    if how == "a folder":
        file.mkdir()
    elif how == "a link to itself":
        file.symlink_to(file)
    elif how == "a broken link":
        file.symlink_to("/nowhere")
    elif how == "a pipe":
        os.mkfifo(file)
    else:
        file.touch()
    return how
