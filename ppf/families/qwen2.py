"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from .base import Family

QWEN2 = Family("qwen2", "Qwen2")
