"""How the command line fails: one line, an exit code, and with --json an object on standard output.

Exit codes: 2 for a user's mistake, 1 for anything else that PPF raises on purpose, 130 for Ctrl-C, 143 and 129 for
SIGTERM and SIGHUP. Of several processes that fail, for one reason as a rule, the first one to fail speaks.
"""

from __future__ import annotations

import errno
import signal
from typing import Any

import typer
from typer.core import TyperGroup

from .. import ranks
from ..errors import InputError, PPFError, shown
from .console import errors, print_json
from .signals import told_of

# typer carries its own copy of click since 0.20; this is the class of "no such option" in either.
_UsageError = typer.BadParameter.__base__

_LONGEST = 600
_AFTER_INTERRUPT = {
    "fit": "Start the same command again: it goes on where it stopped",
    "prune": "Nothing was written to OUT; evaluations of --search stay in RUN",
    "recover": "Start the same command again: it goes on where it stopped",
    "compare": "Start the same command again: finished methods are kept",
    "demo": "Start it again",
}
_OF_SYSTEM = {
    errno.EACCES: "Get the right to use it, or name another",
    errno.EPERM: "Get the right to use it, or name another",
    errno.ENOENT: "Check that it is still there",
    errno.EROFS: "Name a place that can be written",
    errno.EMFILE: "Allow more open files: ulimit -n",
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
        except KeyboardInterrupt as stop:
            if ranks.launched()[1] > 1:  # the terminal and torchrun both send it
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            hint = _AFTER_INTERRUPT.get(ctx.invoked_subcommand, "Nothing was written")
            code, problem = told_of(stop)
            _fail(as_json, code, {"problem": problem, "remedy": hint}, f"{problem[0].upper()}{problem[1:]}. {hint}.")
        except InputError as error:
            said = {name: str(getattr(error, name)) for name in ("field", "value", "problem", "remedy")}
            facts = {name: shown(text, _LONGEST) for name, text in said.items()}
            _fail(as_json, 2, facts, f"Error: {error}")
        except _UsageError as error:
            message = shown(error.format_message().rstrip("."), _LONGEST) + "."
            remedy = f"See `{error.ctx.command_path if error.ctx else 'ppf'} --help`"
            _fail(as_json, 2, {"problem": message, "remedy": remedy}, f"Error: {message} {remedy}")
        except PPFError as error:
            problem = shown(error, _LONGEST)
            _fail(as_json, 1, {"problem": problem}, f"Error: {problem}")
        except (MemoryError, RuntimeError) as error:
            whose = _exhausted(error)
            if whose is None and "Symlink loop" in str(error):  # pathlib's, until Python 3.13
                problem, remedy = shown(error), "Name another folder"
                _fail(as_json, 1, {"problem": problem, "remedy": remedy}, f"Error: {problem}. {remedy}")
            if whose is None:
                raise
            problem = f"{whose} does not hold what this needs, and nothing smaller is left to try"
            facts = {"problem": problem, "remedy": _MORE_MEMORY}
            _fail(as_json, 1, facts, f"Error: {problem}. {_MORE_MEMORY}")
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of a pipe has left; not worth a message
                raise
            file, problem = error.filename or "(none)", error.strerror or str(error) or type(error).__name__
            remedy = _OF_SYSTEM.get(error.errno, "This is what the system says; put it right and start again")
            told = f"{shown(file)}: {shown(problem)}" if error.filename else shown(problem)
            facts = {"field": "file", "value": shown(file), "problem": problem, "remedy": remedy}
            _fail(as_json, 1, facts, f"Error: {told}. {remedy}")


def _exhausted(error: MemoryError | RuntimeError) -> str | None:
    """Whose memory it is that an error says to be full, None if it says something else."""
    said = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in said or "can't start new thread" in said:
        return "this machine's memory"
    # torch's, which need not be loaded here
    return "the GPU's memory" if type(error).__name__ == "OutOfMemoryError" else None


def _fail(as_json: bool, code: int, facts: dict[str, str], line: str) -> None:
    def say() -> None:
        if as_json:
            print_json({"error": facts})
        errors.print(" ".join(line.split()), style="red", markup=False, highlight=False, soft_wrap=True)

    raise typer.Exit(ranks.speak_for_all(say, code))
