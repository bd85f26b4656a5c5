"""The tables of real models in docs/families.md, between their markers, from benchmarks/results/family_*.json."""

from __future__ import annotations

import re
from typing import Any

from tables import DOCS, RESULTS, load, table

_PAGE = DOCS / "families.md"
_COLUMNS = {
    "PPF, masked": "masked", "materialised": "materialised", "reloaded": "reloaded", "Puzzle": "puzzle",
    "uniform": "uniform",
}  # fmt: skip


def fill_families() -> None:
    """Write the tables into the page."""
    found = [load(path.name) for path in sorted(RESULTS.glob("family_*.json"), reverse=True)]
    text = _PAGE.read_text(encoding="utf-8")
    for marker, parts in (("real models", map(_perplexities, found)), ("texts", [_texts(found)])):
        replacement = f"<!-- {marker} -->\n" + "\n\n".join(parts) + f"\n<!-- end of {marker} -->"
        pattern = f"<!-- {marker} -->.*<!-- end of {marker} -->"
        text = re.sub(pattern, lambda _, new=replacement: new, text, flags=re.DOTALL)
    _PAGE.write_text(text, encoding="utf-8")


def _perplexities(data: dict[str, Any]) -> str:
    where, protocol, fit = data["environment"], data["protocol"], data["fit"]
    shown = {title: name for title, name in _COLUMNS.items() if name in data["rows"][0]["perplexity"]}
    rows = [
        (f"{row['delivered']:.1%}", *(f"{row['perplexity'][name]:.2f}" for name in shown.values()))
        for row in data["rows"]
    ]
    device = "CPU (2 cores)" if where["device"] == "cpu" else f"One {where['device']}"
    facts = (
        f"**{data['model']}**, dense {data['dense']['perplexity']:.2f}. {protocol['tokens']:,} tokens "
        f"({protocol['part']}) in sequences of {protocol['sequence_length']:,}; fitted in {data['fit_seconds']:.0f} s "
        f"with {fit['evaluations']:,} evaluations of {fit['evaluation_tokens']:,} tokens, FFN multiple "
        f"{fit['ffn_multiple']}. {device}, torch {where['torch']}, transformers {where['transformers']}, "
        f"{where['date']}."
    )
    return f"{facts}\n\n" + table(("removed", *shown), rows)


def _texts(found: list[dict[str, Any]]) -> str:
    rows = []
    for data in found:
        rows.append((data["model"], "dense", _inline(data["dense"]["text"])))
        rows += [("", f"{row['delivered']:.0%}", _inline(row["text"])) for row in data["rows"]]
    return table(("model", "removed", "goes on with"), rows)


def _inline(text: str) -> str:
    """For a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
