"""What to measure next: all over the ratios for a fit, or for the best policy of one budget."""

from .static import Search

__all__ = ["Search"]
