"""Gemma 3, its text tower: Gemma 2 with normalised heads instead of caps; local layers have a rotation of their own."""

from dataclasses import replace

from .base import Family
from .gemma2 import SANDWICHED_ATTENTION, SANDWICHED_FFN

GEMMA3 = Family(
    "gemma3_text",
    "Gemma3",
    attention=replace(SANDWICHED_ATTENTION, head_norms={"query": "q_norm", "key": "k_norm"}),
    ffn=SANDWICHED_FFN,
    traits=frozenset({"one-plus norm", "scaled embedding"}),
    begins=True,
    module="gemma3",
    text="Text",
    towers={"gemma3": "model.language_model."},
)
