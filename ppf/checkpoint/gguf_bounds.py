"""What a GGUF file says it holds, looked through before anything is made of it: the gguf package believes every count.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError, shown

DAMAGED = "It is damaged or another file: get it again"
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Several times what the largest models have: entries, tensors, their dimensions; items of all arrays (tokens, merges);
# bytes of one string (templates).
_MOST_FIELDS, _MOST_TENSORS, _MOST_DIMENSIONS, _MOST_ITEMS = 5_000, 20_000, 4, 4_000_000
_LONGEST_STRING = 1 << 20
# Arrays of numbers up to this length are kept: widths of layers, not tokens.
_KEPT = 4_096
_TOKENS, _DEFAULT_ALIGNMENT, _LARGEST_ALIGNMENT = "tokenizer.ggml.tokens", 32, 1 << 16


@dataclass
class Outline:
    """``fields``: scalars, strings and short arrays of numbers by name. ``shapes``: of all tensors, as torch has them.
    ``places``: their type, gguf's number, and where their bytes begin. ``tokens``: how many the vocabulary has, None
    without one."""

    fields: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    tokens: int | None = None


def outline(file: Path) -> Outline:
    """Raises ``InputError`` for a file that is cut off, whose counts and lengths go beyond it or beyond all reason, or
    whose tensors lie outside it. Costs what the metadata are long."""
    with file.open("rb") as stream:
        if stream.read(4) != _MAGIC:
            raise InputError("GGUF file", file, "does not begin as GGUF files do", DAMAGED)
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walk(file, data).outline()


class _Walk:
    """Through the file from its beginning."""

    def __init__(self, file: Path, data: mmap.mmap):
        self.file, self.data, self.at, self.items = file, data, len(_MAGIC), 0
        self.found = Outline()

    def outline(self) -> Outline:
        if (version := self.number("I")) not in _VERSIONS:
            raise self.refused(f"is of version {version}; PPF reads {' and '.join(map(str, _VERSIONS))}")
        tensors = self.count("tensors", _MOST_TENSORS)
        for _ in range(self.count("fields", _MOST_FIELDS)):
            name = self.string()
            self.found.fields[name] = self.value(name, self.number("I"))
        infos = [self.tensor() for _ in range(tensors)]
        self.place(infos)
        return self.found

    def value(self, name: str, kind: int) -> Any:
        if kind == _ARRAY:
            return self.array(name)
        return self.string() if kind == _STRING else self.number(self.format(name, kind))

    def array(self, name: str) -> Any:
        """Its items if these are few numbers; else None."""
        kind, length = self.number("I"), self.count(f"items of {name}", _MOST_ITEMS)
        self.items += length
        if self.items > _MOST_ITEMS:
            raise self.refused(f"says that its arrays have more than {_MOST_ITEMS:,} items")
        if name == _TOKENS:
            self.found.tokens = length
        if kind == _STRING:
            for _ in range(length):
                self.skip(self.number("Q"), name)
            return None
        letter = self.format(name, kind)
        size = length * struct.calcsize(letter)
        if length > _KEPT:
            return self.skip(size, name)
        start = self.at
        self.skip(size, name)
        return list(struct.unpack_from(f"<{length}{letter}", self.data, start))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise self.refused(f"says that tensor {shown(name)} has {dimensions:,} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return name, shape[::-1], self.number("I"), self.number("Q")

    def place(self, infos: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        """Where tensors lie, which must be inside the file, and the file must end with them."""
        from gguf import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        alignment = self.found.fields.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
            raise self.refused(f"has general.alignment {shown(alignment)}, which is not a power of two")
        begin, end = -(-self.at // alignment) * alignment, 0
        for name, shape, kind, offset in infos:
            block, size = sizes.get(kind, (0, 0))
            elements = math.prod(shape)
            if not block or elements % block or min(shape, default=1) < 1:
                raise self.refused(f"gives tensor {shown(name)} shape {list(shape)} and type {kind}")
            end = max(end, offset + elements // block * size)
            if begin + end > len(self.data):
                raise self.refused(f"is cut off: tensor {shown(name)} lies beyond its end")
            self.found.shapes[name], self.found.places[name] = shape, (kind, begin + offset)
        if len(self.data) > begin + end + _LARGEST_ALIGNMENT:
            raise self.refused(f"has {len(self.data) - begin - end:,} bytes more than its tensors")

    def number(self, letter: str) -> Any:
        start = self.at
        self.skip(struct.calcsize(letter), "a number")
        return struct.unpack_from(f"<{letter}", self.data, start)[0]

    def count(self, what: str, most: int) -> int:
        found = self.number("Q")
        if found > most:
            raise self.refused(f"says that it has {found:,} {shown(what)}, and PPF reads up to {most:,}")
        return found

    def string(self) -> str:
        length, start = self.number("Q"), self.at
        if length > _LONGEST_STRING:
            raise self.refused(f"says that a string has {length:,} bytes")
        self.skip(length, "a string")
        return self.data[start : self.at].decode("utf-8", "backslashreplace")

    def skip(self, size: int, what: str) -> None:
        if size > len(self.data) - self.at:
            raise self.refused(f"is cut off within {shown(what)}")
        self.at += size

    def format(self, name: str, kind: int) -> str:
        if kind not in _FORMATS:
            raise self.refused(f"gives {shown(name)} the type {kind}, which GGUF does not have here")
        return _FORMATS[kind]

    def refused(self, problem: str) -> InputError:
        return InputError("GGUF file", self.file, problem, DAMAGED)
