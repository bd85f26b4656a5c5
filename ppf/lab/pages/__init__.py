"""Result pages: one self-contained HTML file each, without scripts or network, readable on a phone and in the dark."""

from .figures import figure
from .page import Page

__all__ = ["Page", "figure"]
