"""The table of docs/reliability.md, between its markers, and the same as JSON in benchmarks/results/campaign.json."""

from __future__ import annotations

import json
import os
import platform
import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ppf._version import versions
from ppf.storage.files import write_json, write_text

from . import FOLDER
from .attacks import ATTACKS
from .outcomes import FAULTS, REFUSED, SUCCESS, Try, counted

_ROOT = FOLDER.parents[1]
PAGE, RESULT = _ROOT / "docs" / "reliability.md", _ROOT / "benchmarks" / "results" / "campaign.json"
_COLUMNS = (SUCCESS, REFUSED, *FAULTS)
_MARKERS = "<!-- campaign -->", "<!-- end of campaign -->"


def fill(tries: Sequence[Try], seconds: float) -> None:
    """Write the result file, and the page's table from it."""
    write_json(RESULT, _facts(tries, seconds))
    fill_page()


def fill_page() -> None:
    """Write the table of the result file into the page."""
    text, table = PAGE.read_text(encoding="utf-8"), _table(json.loads(RESULT.read_text(encoding="utf-8")))
    begin, end = _MARKERS
    write_text(PAGE, re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL))


def _facts(tries: Sequence[Try], seconds: float) -> dict[str, Any]:
    kinds = Counter(ATTACKS[one.attack].kind for one in tries)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "versions": versions() | {"system": platform.platform(terse=True)},
        "totals": dict(kinds),
        "attacks": counted(tries),
        "faults": [one.to_dict() | {"command": one.command} for one in tries if one.is_fault],
    }


def _table(data: dict[str, Any]) -> str:
    totals = ", ".join(f"{count:,} {kind}" for kind, count in data["totals"].items())
    facts = (
        f"{data['date']}: {totals}, in {data['seconds'] / 60:.0f} minutes on {data['cores']} cores; "
        f"{len(data['faults'])} faults. torch {data['versions']['torch']}, transformers "
        f"{data['versions']['transformers']}, Python {data['versions']['python']}."
    )
    head = ("attack", "what", "tries", *_COLUMNS)
    rows = [head, ["---"] * 2 + ["--:"] * (len(head) - 2)]
    for attack, counts in data["attacks"].items():
        cells = (f"{counts.get(outcome, 0):,}" for outcome in _COLUMNS)
        rows.append((attack, ATTACKS[attack].of, f"{sum(counts.values()):,}", *cells))
    return f"{facts}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)
