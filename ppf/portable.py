"""What every reader accepts: attention whole in every layer, FFN widths in multiples of 256 or none."""

MULTIPLE = 256
"""DeciLM's readers round FFN widths up to it, and GGUF's K-quants need it."""
