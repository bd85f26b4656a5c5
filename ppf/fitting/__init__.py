"""``ppf fit``: the stages that fill a run, and the loop that measures and learns."""

from .stages import fit

__all__ = ["fit"]
