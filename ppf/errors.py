"""The errors a user can meet. Each one names the field, the value it had, and the remedy."""

from __future__ import annotations


class PPFError(Exception):
    """Base of every error PPF raises on purpose."""


class InputError(PPFError, ValueError):
    """A user's mistake: bad argument, bad file, impossible request. The CLI exits with code 2.

    ``field`` is the argument or file at fault, ``value`` what was given, ``remedy`` what to do about it.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str):
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(f"{field} = {value}: {problem}. {remedy}")

    def __reduce__(self) -> tuple:
        """Errors travel between the processes of a job; what a value was is then its text."""
        return InputError, (self.field, str(self.value), self.problem, self.remedy)
