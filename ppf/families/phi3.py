"""Phi-3 and Phi-4: queries, keys and values in one matrix, gate and up in another; heads may be rotated in part."""

from dataclasses import replace

from .base import ATTENTION, FFN, Family

PHI3 = Family(
    "phi3",
    "Phi3",
    attention=replace(ATTENTION, rows={"qkv_proj": ("query", "key", "value")}),
    ffn=replace(FFN, rows={"gate_up_proj": ("gate", "up")}),
)
