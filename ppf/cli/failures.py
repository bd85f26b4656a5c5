"""How the command line fails: one line, an exit code, and with --json an object on standard output.

Exit codes: 2 for a user's mistake, 1 for anything else that PPF raises on purpose, 130 for Ctrl-C. Of several processes
that fail, for one reason as a rule, the first one to fail speaks.
"""

from __future__ import annotations

import errno
import signal
from typing import Any

import typer
from typer.core import TyperGroup

from .. import ranks
from ..errors import InputError, PPFError
from .console import errors, print_json

# typer carries its own copy of click since 0.20; this is the class of "no such option" in either.
_UsageError = typer.BadParameter.__base__

_AFTER_INTERRUPT = {
    "fit": "Start the same command again: it goes on where it stopped",
    "prune": "Nothing was written to OUT; evaluations of --search stay in RUN",
    "recover": "Start the same command again: it goes on where it stopped",
    "compare": "Start the same command again: finished methods are kept",
    "demo": "Start it again",
}
_MORE_MEMORY = (
    "Use --weights host where the command has it, a larger --gpu-memory-gb, "
    "a shorter --sequence-length, or --device cpu"
)


class Commands(TyperGroup):
    """The group of all commands; turns what they raise into messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        as_json = "--json" in ctx.args
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if ranks.launched()[1] > 1:  # the terminal and torchrun both send it
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            hint = _AFTER_INTERRUPT.get(ctx.invoked_subcommand, "Nothing was written")
            _fail(as_json, 130, {"problem": "interrupted", "remedy": hint}, f"Interrupted. {hint}.")
        except InputError as error:
            facts = {name: str(getattr(error, name)) for name in ("field", "value", "problem", "remedy")}
            _fail(as_json, 2, facts, f"Error: {error}")
        except _UsageError as error:
            message = error.format_message().rstrip(".") + "."
            remedy = f"See `{error.ctx.command_path if error.ctx else 'ppf'} --help`"
            _fail(as_json, 2, {"problem": message, "remedy": remedy}, f"Error: {message} {remedy}")
        except PPFError as error:
            _fail(as_json, 1, {"problem": str(error)}, f"Error: {error}")
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be loaded here
                raise
            problem = "the GPU's memory does not hold what this needs, and nothing smaller is left to try"
            facts = {"problem": problem, "remedy": _MORE_MEMORY}
            _fail(as_json, 1, facts, f"Error: {problem}. {_MORE_MEMORY}")
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of a pipe has left; not worth a message
                raise
            _fail(as_json, 1, {"problem": str(error)}, f"Error: {error}")


def _fail(as_json: bool, code: int, facts: dict[str, str], line: str) -> None:
    def say() -> None:
        if as_json:
            print_json({"error": facts})
        errors.print(" ".join(line.split()), style="red", markup=False, highlight=False, soft_wrap=True)

    raise typer.Exit(ranks.speak_for_all(say, code))
