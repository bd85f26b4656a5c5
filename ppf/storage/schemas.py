"""JSON files, read against a schema: what comes back has the fields and types that were asked for.

A schema is a ``msgspec.Struct`` (or any type that msgspec knows), whose constraints are checked as well. Fields that a
schema does not name are ignored.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from ..errors import InputError

_Schema = TypeVar("_Schema")

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
"""A number of things."""
Finite = Annotated[float, msgspec.Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""Neither NaN nor infinite."""
Nonnegative = Annotated[float, msgspec.Meta(ge=0, le=sys.float_info.max)]
"""The same, and not negative."""
# More than any file of settings holds, and little enough to be read at once.
_LARGEST_FILE = 1 << 28


def read_as(schema: type[_Schema] | Any, field: str, path: str | Path, remedy: str) -> _Schema:
    """What the JSON file at ``path`` holds, as ``schema``.

    Raises ``InputError`` about ``field`` if the file cannot be read, is no JSON or does not fit the schema; the message
    names the place in the file.
    """
    try:
        if os.path.getsize(path) > _LARGEST_FILE:
            raise InputError(field, path, f"has more than {_LARGEST_FILE:,} bytes", remedy)
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(field, path, f"cannot be read ({error.strerror or error})", remedy) from None
    except UnicodeDecodeError as error:
        raise InputError(field, path, f"is not JSON ({error})", remedy) from None
    return parse_as(schema, field, path, text, remedy)


def require_file(field: str, path: str | Path, remedy: str) -> None:
    """Raise ``InputError`` about ``field`` for a pipe or a device at ``path``: who opens one waits for its other end.

    For files in folders that may be strangers'; one that the user names may well be a pipe.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # opening it says why
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(field, path, "is a pipe or a device, not a file", remedy)


def parse_as(schema: type[_Schema] | Any, field: str, value: object, text: str, remedy: str) -> _Schema:
    """The same for a ``text`` that is at hand; ``value`` is what the message says that it is."""
    try:
        # json and not msgspec's own reader: what others write may hold Infinity and NaN.
        return convert_to(schema, field, value, json.loads(text), remedy)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(field, value, f"is not JSON ({error})", remedy) from None


def convert_to(schema: type[_Schema] | Any, field: str, value: object, data: Any, remedy: str) -> _Schema:
    """``data``, which ``json.loads`` gave, as ``schema``. Raises ``InputError`` that names where they differ."""
    try:
        return msgspec.convert(data, schema)
    except (msgspec.ValidationError, UnicodeError) as error:  # the latter: half a character
        raise InputError(field, value, f"does not hold what it should ({error})", remedy) from None
