"""Which field of a configuration it is that transformers refuses, when transformers does not say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from time import process_time
from typing import Any, TypeVar

from ..errors import InputError, shown

# Seconds of work: a message that names the file only is better than one that takes long.
_PATIENCE = 0.5
CORRECT = "Correct the file, or get it again from the model's own source"

Result = TypeVar("Result")
Fields = Mapping[str, Any]


def attempt(file: Path, data: Fields, action: Callable[[Fields], Result]) -> Result:
    """``action(data)``; whatever it raises becomes an ``InputError`` about the field of ``data``, the content of
    ``file``, without which it raises nothing."""
    try:
        return action(data)
    except Exception as error:  # transformers and its validators raise many kinds, all about the file's content
        said = shown(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        problem = f"transformers refuses it in {file} ({said})"
        # Nested values and names of things are more often at fault than what validators look at.
        deadline = process_time() + _PATIENCE
        for field in sorted(data, key=lambda name: not isinstance(data[name], dict | list | str)):
            if process_time() > deadline:
                break
            if _works(action, {name: value for name, value in data.items() if name != field}):
                raise InputError(field, data[field], problem, CORRECT) from error
        raise InputError("config", file, problem, CORRECT) from error


def _works(action: Callable[[Fields], Any], data: Fields) -> bool:
    try:
        action(data)
    except Exception:
        return False
    return True
