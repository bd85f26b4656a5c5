"""The command line. Commands import what they need when they run: help loads neither torch nor transformers."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from .. import ranks
from ..errors import printable
from .bench import bench
from .compare import compare
from .console import errors
from .demo import demo
from .eval import evaluate
from .export import export
from .failures import Commands
from .fit import fit
from .generate import generate
from .info import info
from .pareto import pareto
from .policy import policy
from .processes import join, leave
from .profile import profile
from .prune import prune
from .recover import recover
from .report import report
from .signals import heed
from .unforeseen import tell

_show_others = warnings.showwarning

app = typer.Typer(name="ppf", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
# In the order in which --help shows them.
_GROUPS = {
    "Use": {
        "fit": fit,
        "policy": policy,
        "prune": prune,
        "eval": evaluate,
        "generate": generate,
        "export": export,
        "recover": recover,
        "info": info,
        "demo": demo,
    },
    "Judge": {
        "report": report,
        "compare": compare,
        "pareto": pareto,
        "bench": bench,
        "profile": profile,
    },
}
for _group, _commands in _GROUPS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_group)(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .._version import versions

        typer.echo(f"ppf {versions()['ppf']}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Structural pruning of decoder language models: fit once, then any size in milliseconds."""
    _quiet_transformers()
    join(context.invoked_subcommand)


def _quiet_transformers() -> None:
    """No notes and bars of others between ours. transformers reads the environment when it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _show_warning(message: Warning | str, category: type[Warning], *place: object) -> None:
    """PPF's own warnings, which begin with its name, in one line of the user's; others' as Python shows them. Only the
    first of several processes warns."""
    text = str(message)
    if not ranks.first():
        return
    if text.startswith("ppf: "):
        told = printable(text.removeprefix("ppf: "))
        errors.print(f"Note: {told}", markup=False, highlight=False, soft_wrap=True)
    else:
        _show_others(message, category, *place)


def main() -> None:
    """Entry point of the ``ppf`` command."""
    heed()
    warnings.showwarning = _show_warning
    _never_refuse_characters()
    try:
        app(prog_name="ppf")
    except SystemExit as stop:
        leave(stop.code or 0)
        raise
    except Exception as error:
        code = tell(error, "--json" in sys.argv)
        leave(code)
        raise SystemExit(code) from None


def _never_refuse_characters() -> None:
    """What a terminal's encoding does not have, or what no encoding has (names of files may be any bytes), is escaped:
    no command ends because of it, after its work."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
