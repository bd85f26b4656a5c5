"""Results that stand already: what is there and exactly what is asked for is not made again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from ..checkpoint import verify
from ..checkpoint.report import OWN, read_report
from ..errors import InputError, shown
from ..storage.locks import tidy


def report_of(output: str | Path) -> dict[str, Any] | None:
    """What the ``ppf.json`` in ``output`` says, but for what tells its own folder; None if there is none that can be
    believed."""
    try:
        found = read_report(Path(output))
    except (InputError, OSError):
        return None
    return {name: value for name, value in found.items() if name not in OWN} or None


def stands(output: str | Path, found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """True, with a warning that says so, if ``found``, the report of ``output``, says all that is ``expected`` of it,
    and every file is as PPF wrote it."""
    expected = json.loads(json.dumps(expected))
    if any(name not in found or found[name] != value for name, value in expected.items()):
        return False
    try:
        if not verify(output):
            return False
    except InputError:  # changed since
        return False
    tidy(output)
    warnings.warn(f"ppf: {shown(output)} holds exactly this already: nothing was written", stacklevel=3)
    return True
