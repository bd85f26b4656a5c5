"""Granite: Llama with multipliers on embeddings, scores, residuals and logits."""

from .base import Family

GRANITE = Family("granite", "Granite", traits=frozenset({"residual scale", "scaled embedding"}))
