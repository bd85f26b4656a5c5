"""The errors a user can meet. Each one names the field, the value it had, and the remedy."""

from __future__ import annotations

_LONGEST = 200


class PPFError(Exception):
    """Base of every error PPF raises on purpose."""


class InputError(PPFError, ValueError):
    """A user's mistake: bad argument, bad file, impossible request. The CLI exits with code 2.

    ``field`` is the argument or file at fault, ``value`` what was given, ``remedy`` what to do about it. The message
    shows them with :func:`shown`: any of them may hold what a stranger's file says.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str):
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(f"{shown(field)} = {shown(value)}: {shown(problem, 3 * _LONGEST)}. {shown(remedy)}")

    def __reduce__(self) -> tuple:
        """Errors travel between the processes of a job; what a value was is then its text."""
        return InputError, (self.field, str(self.value), self.problem, self.remedy)


def shown(value: object, longest: int = _LONGEST) -> str:
    """``value`` as one line fit for a terminal: at most ``longest`` characters, with those that no terminal prints
    (control codes, lone surrogates, marks that turn the direction of text) as escapes."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # whole numbers of thousands of digits, lists in lists in lists
        text = f"(a {type(value).__name__} that is too large to show)"
    if len(text) > longest:
        text = f"{text[: longest - 2 - longest // 4]} … {text[len(text) - longest // 4 + 1 :]}"
    return "".join(map(_visible, text))


def printable(text: str) -> str:
    """``text`` of any length with its lines and tabs, and all else that no terminal prints as escapes."""
    return "".join(c if c in "\n\t" else _visible(c) for c in text)


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()
