"""Gemma 2: norms before and after every sub-layer, GeGLU, capped scores and logits, every other layer local."""

from dataclasses import replace

from .base import ATTENTION, FFN, Family

SANDWICHED_ATTENTION = replace(ATTENTION, after="post_attention_layernorm")
SANDWICHED_FFN = replace(FFN, before="pre_feedforward_layernorm", after="post_feedforward_layernorm")

GEMMA2 = Family(
    "gemma2",
    "Gemma2",
    attention=SANDWICHED_ATTENTION,
    ffn=SANDWICHED_FFN,
    traits=frozenset({"one-plus norm", "scaled embedding"}),
    begins=True,
)
