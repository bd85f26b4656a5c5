"""Texts, wherever they come from, as token sequences, and the disjoint parts that calibration and evaluation use."""

from .packing import BATCH_TOKENS, Splits, batches, check_context, pack, predicting, split, take_tokens, unpadded
from .reading import Tokens, documents, read, read_tokens
from .source import Text
from .tokens import begin_token

__all__ = [
    "BATCH_TOKENS",
    "Splits",
    "Text",
    "Tokens",
    "batches",
    "begin_token",
    "check_context",
    "documents",
    "pack",
    "predicting",
    "read",
    "read_tokens",
    "split",
    "take_tokens",
    "unpadded",
]
