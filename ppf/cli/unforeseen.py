"""What nobody foresaw: one line for the user, the traceback in a file for whoever mends it."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback

from .. import ranks
from ..errors import shown
from .console import errors, print_json

SWITCH = "PPF_TRACEBACK"


def tell(error: Exception, as_json: bool) -> int:
    """Print one line about ``error``, and with ``as_json`` an object on standard output; returns the exit code.

    The traceback goes to a file in the folder for temporary files, or, if that cannot be, to standard error. With
    ``PPF_TRACEBACK=1`` in the environment it is raised as it is.
    """
    if os.environ.get(SWITCH, "0") != "0":
        raise error
    text = "".join(traceback.format_exception(error))
    problem = f"a fault of PPF: {type(error).__name__}: {shown(error)}"

    def say() -> None:
        saved = _saved(text)
        remedy = f"Report it with {saved}" if saved else "Report it with the traceback above"
        if as_json:
            print_json({"error": {"problem": problem, "remedy": remedy, "traceback": saved}})
        if saved is None:
            sys.stderr.write(text)
        errors.print(f"Error: {problem}. {remedy}.", style="red", markup=False, highlight=False, soft_wrap=True)

    return ranks.speak_for_all(say, 1)


def _saved(text: str) -> str | None:
    """Where ``text`` was written, None if nowhere."""
    try:
        number, name = tempfile.mkstemp(prefix="ppf-traceback-", suffix=".txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        return name
    except OSError:
        return None
