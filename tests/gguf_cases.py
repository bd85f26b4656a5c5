"""What tests of GGUF exports share: pre-tokenisers as published, what families are written as, and the comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from export_cases import transformers_logits
from gguf_reference import Reference

from ppf.deliver.export import open_source, to_gguf

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [cut, BYTE_LEVEL | {"use_regex": False}]}


# As published in Llama 3's, Qwen2's, Mistral Nemo's and Phi-4-mini's tokenizer.json.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
    "llama-bpe": split(LLAMA3),
    "dbrx": split(LLAMA3, "Removed", True),
    "qwen2": split(QWEN2),
    "tekken": split(TEKKEN),
    "gpt-4o": split(GPT4O, "Removed", True),
}
IGNORING_MERGES = "llama-bpe", "tekken"
# What a tiny model of each family is written as: dense, with the same widths in all layers, with different ones.
ARCHITECTURES = {
    "llama": ("llama", "llama", "deci"),
    "mistral": ("llama", "llama", "deci"),
    "ministral3": ("mistral3", "mistral3", "deci"),
    "qwen2": ("qwen2", "llama", "deci"),
    "qwen3": ("qwen3", "qwen3", "openelm"),
    "gemma2": ("gemma2", "gemma2", None),
    "gemma3_text": ("gemma3", "gemma3", None),
    "phi3": ("phi3", "llama", "deci"),
    "olmo2": ("olmo2", "olmo2", None),
    "smollm3": ("smollm3", "smollm3", None),
    "granite": ("granite", "granite", "deci"),
}
# Some graphs know no other head than the embedding.
TIED = "gemma2", "qwen3"
BIASED = {"attention_bias": True, "mlp_bias": True}


def written(source: Path, output: Path, dtype: str = "f32", context: int = 0) -> Reference:
    return Reference(output / to_gguf(open_source(source), output, dtype)["file"], context)


def difference(reference: Reference, checkpoint: Path, ids: list[int]) -> float:
    """Largest difference of the logits after the last token, as a share of the largest logit."""
    expected = transformers_logits(checkpoint, ids)[-1].double().numpy()
    return float(np.abs(reference.logits(ids) - expected).max() / np.abs(expected).max())
