"""The tables of what sizes cost in docs/large-models.md, between their markers, from streaming_*.json."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from shapes import structure
from tables import DOCS, RESULTS, load, table

from ppf.fitting.library import library_bytes
from ppf.model.grid import Grid

_PAGE = DOCS / "large-models.md"


def fill_scale() -> None:
    """Write the tables into the page."""
    text = _PAGE.read_text(encoding="utf-8")
    rates, fits = (sorted(RESULTS.glob(f"streaming_{kind}_*.json")) for kind in ("rates", "fit"))
    for marker, parts in (
        ("evaluations by size", (_rates(load(path.name)) for path in rates)),
        ("stages by size", (_fits(load(path.name)) for path in fits)),
        ("libraries by size", [_libraries()]),
    ):
        text = _filled(text, marker, parts)
    _PAGE.write_text(text, encoding="utf-8")


def _filled(text: str, marker: str, parts: Iterable[str]) -> str:
    replacement = f"<!-- {marker} -->\n" + "\n\n".join(parts) + f"\n<!-- end of {marker} -->"
    return re.sub(f"<!-- {marker} -->.*<!-- end of {marker} -->", lambda _: replacement, text, flags=re.DOTALL)


def _rates(data: dict[str, Any]) -> str:
    before = {row["model"]: row for row in data.get("before", ())}
    rows = []
    for row in data["rows"]:
        old = before.get(row["model"])
        rows.append(
            (row["model"].removesuffix(" shape"), f"{row['tokens']:,} in {row['sequence']:,}s", row.get("by", ""),
             f"{row['ms'] / 1e3:.3f}", f"{row['per_second']:,.1f}", f"{row['share_of_limit']:.0%}",
             f"{row['peak_GB']:.1f}", f"{old['per_second']:,.1f} ({old['share_of_limit']:.0%})" if old else "")
        )  # fmt: skip
    facts = (
        f"{data['gpu']}, torch {data['torch']}, {data['date']}; random weights of these shapes, resident; random "
        "policies that keep 30 to 95 %, many at once. The limit counts only operations, at the rate of an 8192³ "
        f"product in the same run. {data.get('note', '')}"
    )
    titles = ("shape", "tokens", "by", "seconds an evaluation", "a second", "share of limit", "peak, GB", "before")
    return f"{facts}\n\n" + table(titles, rows)


def _fits(data: dict[str, Any]) -> str:
    titles = (
        "shape", "GPUs", "weights in", "bound, GB", "measured peak, GB", "calibrating, s", "ranking and factors, s",
        "policies", "seconds an evaluation", "share of limit", "library, GB",
    )  # fmt: skip
    rows = []
    for row in data["rows"]:
        took = row["seconds"]
        rows.append(
            (row["shape"], str(row["gpus"]), row["weights"], f"{row['bound_GB']:g}" if row["bound_GB"] else "–",
             f"{row['peak_GB']:.1f}", f"{took['calibrating']:.1f}", f"{took['ranking and factorising']:.1f}",
             str(row["policies"]), f"{1 / row['per_second']:.2f}", f"{row['share_of_limit']:.0%}",
             f"{row['library_GB']:.1f}")
        )  # fmt: skip
    first = data["rows"][0]
    facts = (
        f"{data['gpu']}, torch {data['torch']}, {data['date']}. Calibration on {first['calibration_tokens']:,} tokens, "
        f"evaluations of {first['tokens']:,}; random weights, of which in host memory four layers are distinct (that "
        f"saves making them, not their traffic). {data.get('note', '')}"
    )
    return f"{facts}\n\n" + table(titles, rows)


def _libraries() -> str:
    """Computed from the shapes: bytes of the factors, of fp32 inverses as they were kept before, and of the model."""
    rows = []
    for name in ("smollm2-135m", "llama-3.2-1b", "llama-2-7b", "llama-3-8b", "qwen2.5-32b", "llama-3.1-70b"):
        found = structure(name)
        grid = Grid(found, max(64, found.ffn[0].units // 16))
        inputs = [sublayer.width for sublayer in found.sublayers]
        before = sum((8 if n <= 2048 else 4) * n * (n + found.hidden) for n in inputs)
        rows.append(
            (name, *(f"{size / 1e9:.2f}" for size in (2 * found.decoder_parameters, library_bytes(grid), before)))
        )
    return table(("shape", "decoder in bf16, GB", "library, GB", "until 2026-11-28, GB"), rows)
