"""What the sections of docs/benchmarks.md share: the result files and Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
MODELS = {"llama-2-7b": "Llama-2-7B", "llama-3-8b": "Llama-3-8B", "qwen2.5-7b": "Qwen2.5-7B", "qwen3-8b": "Qwen3-8B"}


def load(name: str) -> dict[str, Any]:
    """One result file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
