"""What a perplexity was measured on, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def protocol_line(protocol: dict[str, Any]) -> str:
    """The text's name, which part of it, and how much of it in which form."""
    return f"{Path(protocol['text']).name}, {protocol['part']}, {protocol_size(protocol)}"


def protocol_size(protocol: dict[str, Any]) -> str:
    """How many tokens, in which sequences."""
    size = f"{protocol['tokens']:,} tokens in sequences of {protocol['sequence_length']}"
    begin = protocol.get("begin")
    size = size if begin is None else f"{size}, each behind the begin token ({begin})"
    return size + documents(protocol.get("read_as") or {})


def documents(read_as: dict[str, Any]) -> str:
    """How a dataset was read."""
    if "documents" not in read_as:
        return ""
    field = f" of field {read_as['field']}" if "field" in read_as else ""
    return f", {read_as['documents']:,} documents{field} joined by {read_as['joined']}"
