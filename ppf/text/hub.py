"""Datasets that the ``datasets`` library reads: on the hub, streamed, or in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError
from .source import DEFAULT_SPLIT, Text

# What save_to_disk leaves: one dataset, or several by their splits.
_SAVED = ("state.json", "dataset_dict.json")


def dataset_rows(text: Text, field: str) -> Iterator[Any]:
    """The rows of a dataset as they come; of one on the hub, no more is fetched than is read.

    Raises ``InputError`` about ``field`` for a dataset that is not there or not ours to read, and for a split that it
    does not have. No code of a dataset is run.
    """
    library = _library(text, field)
    with _failures(text, field), _without_bars(library):
        yield from _opened(library, text)


def _opened(library: ModuleType, text: Text) -> Any:
    split = text.split or DEFAULT_SPLIT
    if text.is_hub:
        name, _, config = str(text.given).partition(":")
        return library.load_dataset(name, config or None, split=split, streaming=True)
    folder = Path(text.given)
    if not any((folder / name).exists() for name in _SAVED):
        return library.load_dataset(str(folder), split=split, streaming=True)
    saved = library.load_from_disk(folder)
    if not isinstance(saved, library.DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(f"it has no split {split!r}; there are: {', '.join(saved)}")
    return saved[split]


def _library(text: Text, field: str) -> ModuleType:
    try:
        import datasets
    except ModuleNotFoundError:
        problem = "needs the package datasets, which is not installed"
        raise text.refuse(field, problem, "Run: pip install 'ppf[data]'") from None
    return datasets


@contextmanager
def _failures(text: Text, field: str) -> Iterator[None]:
    """The library raises many classes of errors, of its own and of the network's: each becomes one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise text.refuse(field, f"cannot be read as a dataset ({said.rstrip('.')})", _remedy(text, said)) from error


def _remedy(text: Text, said: str) -> str:
    lower = said.lower()
    if "split" in lower:
        return "Name one of them with --split"
    if "config" in lower:
        return f"Name one of them: {text.given}:NAME"
    if not text.is_hub:
        return "Give a file, or a folder that the datasets library can load"
    if any(word in lower for word in ("gated", "authenticated", "401", "403")):
        return "Ask for access on its page, then log in: hf auth login"
    return (
        "Check the name, or the path if a file is meant; it needs the network or a filled cache, "
        "and private ones `hf auth login`"
    )


@contextmanager
def _without_bars(library: ModuleType) -> Iterator[None]:
    """Keep the library's progress bars from ours."""
    shown = library.utils.is_progress_bar_enabled()
    library.utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            library.utils.enable_progress_bars()
