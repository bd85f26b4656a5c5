"""The rows of a dataset file: JSON lines, a JSON array, or Parquet."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .raw import opened
from .source import Text

_BATCH_ROWS = 256
_BOM = b"\xef\xbb\xbf"


def file_rows(text: Text, field: str) -> Iterator[Any]:
    """One object a row, read as they are asked for. Raises ``InputError`` about ``field`` for damaged data."""
    with opened(text, field) as (stream, _):
        if text.format == "parquet":
            yield from _parquet_rows(text, stream, field)
        elif text.format == "json":
            yield from _json_rows(text, stream, field)
        else:
            yield from _lines(text, stream, field)


def _lines(text: Text, stream: BinaryIO, field: str) -> Iterator[Any]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(_BOM) if number == 1 else line
        if line.strip():
            yield _parsed(text, line, field, f"line {number}")


def _json_rows(text: Text, stream: BinaryIO, field: str) -> Iterator[Any]:
    """An array of objects; many files called ``.json`` hold JSON lines, and one object is one line of these."""
    data = stream.read().removeprefix(_BOM)
    if data.lstrip()[:1] == b"[":
        yield from _parsed(text, data, field, "the file")
        return
    try:
        yield json.loads(data)
    except ValueError:
        yield from _lines(text, iter(data.splitlines()), field)


def _parsed(text: Text, data: bytes, field: str, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise text.refuse(field, f"{where} is not JSON ({error})", "Repair it, or give another file") from None


def _parquet_rows(text: Text, stream: BinaryIO, field: str) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        problem = "needs the package pyarrow, which is not installed"
        raise text.refuse(field, problem, "Run: pip install 'ppf[data]'") from None
    try:
        with _seekable(text, stream) as file, ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            wanted = [text.column] if text.column in names else names  # all: the error says which there are
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=wanted):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        problem = f"is not readable as Parquet ({' '.join(str(error).split())[:200]})"
        raise text.refuse(field, problem, "Get it again, or give its true name") from None


def _seekable(text: Text, stream: BinaryIO) -> BinaryIO:
    """Parquet has its directory at the end: what cannot be searched is copied to a temporary file."""
    if text.is_file and not text.compression:
        return open(Path(text.given), "rb")
    file = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
    shutil.copyfileobj(stream, file)
    file.seek(0)
    return file
