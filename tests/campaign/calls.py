"""Python calls that end as a command does: what they raise becomes one line and an exit code."""

from __future__ import annotations

from collections.abc import Callable


def as_a_command(work: Callable[[], None]) -> None:
    """Do ``work`` as if it were ``ppf info``'s."""
    import typer

    from ppf.cli.failures import Commands

    app = typer.Typer(cls=Commands, pretty_exceptions_enable=False, add_completion=False)
    app.callback()(lambda: None)
    app.command("info")(work)
    app(["info"])
