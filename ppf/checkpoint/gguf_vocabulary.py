"""GGUF's words for vocabularies, for reading and for writing them: token types, and pre-tokenisers by their names."""

from __future__ import annotations

from tokenizers import Regex, pre_tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's token types."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SLASHED = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_TEKKEN = rf"{_WORDS[0]}|{_WORDS[1]}|\p{{N}}|{_SLASHED}"
_GPT4O = rf"{_WORDS[0]}{_CONTRACTIONS}?|{_WORDS[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHED}"
_SPLIT = "Split "

PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": (("ByteLevel regex",), False),
    "smollm": (("Digits", "ByteLevel regex"), False),
    "llama-bpe": ((f"{_SPLIT}{_LLAMA3}", "ByteLevel"), True),
    "dbrx": ((f"{_SPLIT}{_LLAMA3}", "ByteLevel"), False),
    "qwen2": ((f"{_SPLIT}{_QWEN2}", "ByteLevel"), False),
    "tekken": ((f"{_SPLIT}{_TEKKEN}", "ByteLevel"), True),
    "gpt-4o": ((f"{_SPLIT}{_GPT4O}", "ByteLevel"), False),
}
"""Pre-tokenisers of byte-level BPE that llama.cpp has under a name, as (steps of tokenizer.json, ignore_merges)."""

SYNONYMS = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "dbrx", "deepseek-r1-qwen": "qwen2",
}  # fmt: skip
"""Other names in files that llama.cpp splits text for in the same way."""


def pre_tokenizer(steps: tuple[str, ...]) -> pre_tokenizers.PreTokenizer:
    """What tokenizers makes of the ``steps`` of one of :data:`PRE_TOKENIZERS`."""
    return pre_tokenizers.Sequence([_made(step) for step in steps])


def _made(step: str) -> pre_tokenizers.PreTokenizer:
    if step.startswith(_SPLIT):
        return pre_tokenizers.Split(Regex(step.removeprefix(_SPLIT)), "isolated")
    if step == "Digits":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == "ByteLevel regex")
