"""Qwen3: every query and key head is normalised before it is rotated."""

from dataclasses import replace

from .base import ATTENTION, Family

QWEN3 = Family("qwen3", "Qwen3", attention=replace(ATTENTION, head_norms={"query": "q_norm", "key": "k_norm"}))
