"""The bytes of a file or of a pipe, decompressed, and hashed as they came."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from .source import STANDARD_INPUT, Text

_BLOCK, _ZSTD_BLOCK = 1 << 20, 1 << 16
_FILE_REMEDY = "Give a UTF-8 text file"
# How files begin that are no text, and what they are.
_MAGIC = {
    b"\x1f\x8b": ("gzip", "Give it a name that ends in .gz, or send it through zcat"),
    b"\x28\xb5\x2f\xfd": ("zstd", "Give it a name that ends in .zst, or send it through zstdcat"),
    b"PAR1": ("Parquet", "Give it a name that ends in .parquet"),
    b"%PDF": ("PDF", _FILE_REMEDY),
    b"PK\x03\x04": ("zip", "Unpack it first"),
    b"\xfd7zXZ": ("xz", "Send it through xzcat"),
    b"BZh": ("bzip2", "Send it through bzcat"),
    b"GGUF": ("GGUF", "That is a model; give a UTF-8 text file"),
    b"\xff\xfe": ("UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16", "Convert it: iconv -f UTF-16 -t UTF-8"),
}


class Hashed(io.RawIOBase):
    """A binary stream that hashes what is read from it."""

    def __init__(self, stream: BinaryIO):
        self._stream, self._digest = stream, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = self._stream.read1(len(buffer))  # what a pipe has by now
        self._digest.update(data)
        buffer[: len(data)] = data
        return len(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


@contextmanager
def opened(text: Text, field: str) -> Iterator[tuple[BinaryIO, Hashed]]:
    """The decompressed bytes of ``text`` as a buffered stream, and what hashes the bytes as they are stored.

    Raises ``InputError`` about ``field`` for what cannot be read, also while it is read: for damaged or cut compressed
    data, and for binary data where a text is expected.
    """
    try:
        with _source(text) as source:
            hashed = Hashed(source)
            stream = _decompressed(text, io.BufferedReader(hashed, _BLOCK), field)
            if text.format != "parquet":
                _refuse_binary(text, stream, field)
            yield stream, hashed
    except EOFError:
        problem = "ends early: its compressed data are cut"
        raise text.refuse(field, problem, "Get it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise text.refuse(field, f"is not gzip data ({error})", "Get it again, or give its true name") from None
    except OSError as error:
        raise text.refuse(field, f"cannot be read ({error.strerror or error})", _FILE_REMEDY) from None


@contextmanager
def _source(text: Text) -> Iterator[BinaryIO]:
    if str(text.given) == STANDARD_INPUT:
        yield sys.stdin.buffer
        return
    with open(text.path, "rb") as file:
        yield file


def _decompressed(text: Text, stream: io.BufferedReader, field: str) -> BinaryIO:
    if text.compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=stream), _BLOCK)
    if text.compression == ".zst":
        return io.BufferedReader(_zstd(text, stream, field), _BLOCK)
    return stream


def _zstd(text: Text, stream: io.BufferedReader, field: str) -> BinaryIO:
    try:
        import zstandard  # noqa: F401
    except ModuleNotFoundError:
        problem = "needs the package zstandard, which is not installed"
        raise text.refuse(field, problem, "Run: pip install 'ppf[data]'") from None
    return _Frames(stream)


class _Frames(io.RawIOBase):
    """zstd frames, decompressed; unlike zstandard's own reader it notices data that end within a frame."""

    def __init__(self, stream: io.BufferedReader):
        self._blocks, self._held = _decompressed_blocks(stream), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._held:
            if (block := next(self._blocks, None)) is None:
                return 0
            self._held = block
        count = min(len(buffer), len(self._held))
        buffer[:count], self._held = self._held[:count], self._held[count:]
        return count


def _decompressed_blocks(stream: io.BufferedReader) -> Iterator[bytes]:
    import zstandard

    frame, block = None, b""
    while block or (block := stream.read1(_ZSTD_BLOCK)):
        frame = frame or zstandard.ZstdDecompressor().decompressobj()
        try:
            yield frame.decompress(block)
        except zstandard.ZstdError as error:
            raise OSError(None, f"is not zstd data: {error}") from None
        block = frame.unused_data if frame.eof else b""
        frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError


def _refuse_binary(text: Text, stream: io.BufferedReader, field: str) -> None:
    """Raise ``InputError`` for what begins as no UTF-8 text does, without taking anything from ``stream``."""
    start = stream.peek(4096)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
        if b"\0" not in start:
            return
    except UnicodeDecodeError:
        pass
    for magic, (kind, remedy) in _MAGIC.items():
        if start.startswith(magic):
            raise text.refuse(field, f"is not UTF-8 text but {kind} data", remedy)
    raise text.refuse(field, "is not UTF-8 text but binary data, or in another encoding", _FILE_REMEDY)
