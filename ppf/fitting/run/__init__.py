"""The run: what a fit leaves on disk, the settings it was made with, and the texts that it was measured on."""

from .directory import Answer, Run
from .protocol import Protocol
from .settings import Settings

__all__ = ["Answer", "Protocol", "Run", "Settings"]
