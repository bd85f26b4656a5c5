"""The command line. Commands import what they need when they run: help loads neither torch nor transformers."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from .. import ranks
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
from .profile import profile
from .prune import prune
from .recover import recover
from .report import report
from .together import join, leave

_show_others = warnings.showwarning

app = typer.Typer(name="ppf", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.command("fit")(fit)
app.command("policy")(policy)
app.command("prune")(prune)
app.command("recover")(recover)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("info")(info)
app.command("compare")(compare)
app.command("profile")(profile)
app.command("pareto")(pareto)
app.command("bench")(bench)
app.command("export")(export)
app.command("report")(report)
app.command("demo")(demo)


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
        errors.print(f"Note: {text.removeprefix('ppf: ')}", markup=False, highlight=False, soft_wrap=True)
    else:
        _show_others(message, category, *place)


def main() -> None:
    """Entry point of the ``ppf`` command."""
    warnings.showwarning = _show_warning
    try:
        app(prog_name="ppf")
    except SystemExit as stop:
        leave(stop.code or 0)
        raise
