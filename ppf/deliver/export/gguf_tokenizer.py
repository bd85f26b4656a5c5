"""A Hugging Face tokenizer in GGUF's terms: byte-level BPE, or BPE from SentencePiece.

llama.cpp does not read tokenizer.json: it re-implements each tokenizer and picks one by name. What it would tokenise
differently is refused here, since nothing would show it later but worse text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ...checkpoint.gguf_vocabulary import BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, UNKNOWN, UNUSED, USER_DEFINED
from ...errors import InputError
from .chat_templates import chat_templates

# What ends a turn by its name in llama.cpp.
_KNOWN_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "<|end_of_text|>", "<end_of_utterance>",
}  # fmt: skip
# Both keep what the pattern finds; the patterns of PRE_TOKENIZERS find everything.
_KEEPING = ("Isolated", False), ("Removed", True)
_REMEDY = (
    "Export to hf, which keeps the tokenizer as it is, or add its pre-tokeniser to ppf/checkpoint/gguf_vocabulary.py"
)


@dataclass(frozen=True)
class Vocabulary:
    """All of ``tokenizer.ggml.*``: one token, type and (SentencePiece) score per id of the model's embedding."""

    model: str  # "gpt2": byte-level BPE; "llama": SentencePiece
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special_ids: dict[str, int]  # bos, eos, unk, pad: those there are; eot, eom: more that end a turn
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | list[dict[str, str]] | None
    """One, or several, each with its "name"."""
    strips_right: bool
    """Whether special tokens swallow the white space behind them, as Phi-3's do."""


def vocabulary(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, ends: Sequence[int] = ()) -> Vocabulary:
    """``tokenizer`` as llama.cpp reads it, padded to the embedding's size; ``ends`` are tokens that stop generation.

    Raises ``InputError`` for a tokenizer that llama.cpp has no equal of.
    """
    data = _description(tokenizer)
    model, merges = data["model"], [_pair(merge) for merge in data["model"].get("merges", [])]
    if model.get("type") != "BPE" or any(model.get(f) for f in ("dropout", "end_of_word_suffix")) or not merges:
        raise _unsupported(f"{model.get('type')} with {len(merges)} merges", "is no plain BPE")
    tokens, types = _tokens(data, config.vocab_size)
    scores, space = None, False
    if model.get("byte_fallback"):
        scores, space = _scores(tokens, merges), _space_prefix(data)
        kind, pre = "llama", "default"
    else:
        kind, pre = "gpt2", _pre_tokenizer(data)
    begins, closes = _added_around(tokenizer)
    ids = _special_ids(tokenizer, config)
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=None if scores else [f"{left} {right}" for left, right in merges],
        special_ids=ids | _turn_ends(tokens, ids, ends),
        add_bos=begins,
        add_eos=closes,
        add_space_prefix=space,
        chat_template=chat_templates(tokenizer),
        strips_right=any(added["special"] and added["rstrip"] for added in data["added_tokens"]),
    )


def _description(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unsupported(type(tokenizer).__name__, "has no tokenizer.json")
    return json.loads(backend.to_str())


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _tokens(data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id; ids without a token (an embedding that was padded) become unused ones, added tokens
    that the embedding has no row for are left out."""
    tokens, types = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    unknown, vocabulary = data["model"].get("unk_token"), data["model"]["vocab"]
    if (last := max(vocabulary.values(), default=-1)) >= size:
        raise _unsupported(last, f"is a token of the tokenizer, but the model ends at {size - 1}")
    for token, index in vocabulary.items():
        is_byte = data["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[index], types[index] = token, BYTE if is_byte else NORMAL
    for added in data["added_tokens"]:
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    for index, token in enumerate(tokens):
        if token == unknown:
            types[index] = UNKNOWN
    return tokens, types


def _pre_tokenizer(data: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokeniser of a byte-level BPE."""
    for step in _steps(data["normalizer"], "normalizers"):
        # llama.cpp leaves text as it is. Nearly all text is in this form already.
        if step["type"] != "NFC":
            raise _unsupported(step["type"], "normalises text before byte-level BPE")
    steps = tuple(_step(step) for step in _steps(data["pre_tokenizer"], "pretokenizers"))
    found = steps, bool(data["model"].get("ignore_merges"))
    for name, known in PRE_TOKENIZERS.items():
        if found == known:
            return name
    raise _unsupported(" + ".join(steps)[:80] or "(none)", f"is none of the pre-tokenisers {list(PRE_TOKENIZERS)}")


def _steps(part: dict[str, Any] | None, plural: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokeniser, which may be a sequence, one, or none."""
    if part is None:
        return []
    return part[plural] if part["type"] == "Sequence" else [part]


def _step(step: dict[str, Any]) -> str:
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "ByteLevel regex" if step.get("use_regex", True) else "ByteLevel"
    if kind == "Digits" and step["individual_digits"]:
        return "Digits"
    if kind == "Split" and (step["behavior"], step["invert"]) in _KEEPING:
        return f"Split {step['pattern'].get('Regex')}"
    return kind + " (other options)"


def _scores(tokens: list[str], merges: list[tuple[str, str]]) -> list[float]:
    """SentencePiece's scores, the higher the sooner merged: minus the rank of the first merge that makes the token.

    tokenizer.json has ranks of pairs where SentencePiece has scores of pieces. They agree if every pair of tokens
    that joins to a merged token is a merge, as transformers writes them; refused otherwise.
    """
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    known, pairs = set(tokens), set(merges)
    for token in rank:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in known and pair[1] in known and pair not in pairs:
                raise _unsupported("BPE with byte_fallback", f"lacks the merge {pair}, unlike any SentencePiece model")
    lowest = -len(merges)
    return [float(-rank[token]) if token in rank else float(lowest) for token in tokens]


def _space_prefix(data: dict[str, Any]) -> bool:
    """Whether a text gets a space in front. Raises ``InputError`` unless spaces become ▁ and nothing else happens."""
    prefix = replaced = False
    for step in _steps(data["normalizer"], "normalizers"):
        if step == {"type": "Prepend", "prepend": "▁"}:
            prefix = True
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁":
            replaced = True
        else:
            raise _unsupported(step["type"], "normalises text as llama.cpp's SentencePiece does not")
    for step in _steps(data["pre_tokenizer"], "pretokenizers"):
        if replaced and step["type"] == "Split" and step["pattern"] == {"String": " "}:
            continue  # there are none any more
        if step["type"] != "Metaspace" or step["replacement"] != "▁" or step.get("split", True):
            raise _unsupported(step["type"], "splits text as llama.cpp's SentencePiece does not")
        prefix, replaced = step["prepend_scheme"] != "never", True
    if not replaced:
        raise _unsupported("BPE with byte_fallback", "does not write spaces as ▁")
    return prefix


def _added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokenizer itself puts a begin token before a text, an end token after it."""
    ids = tokenizer("a")["input_ids"]
    return ids[0] == tokenizer.bos_token_id, ids[-1] == tokenizer.eos_token_id


def _special_ids(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> dict[str, int]:
    """The tokenizer's special ids; where it has none, the config's."""
    ids = {}
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is None:
            index = getattr(config, f"{name}_token_id", None)
        index = index[0] if isinstance(index, list) else index
        if index is not None and 0 <= index < config.vocab_size:
            ids[name] = index
    return ids


def _turn_ends(tokens: list[str], ids: dict[str, int], ends: Sequence[int]) -> dict[str, int]:
    """Tokens of ``ends`` that llama.cpp would not stop at by itself: it has room for two."""
    unknown = [index for index in ends if index < len(tokens) and index != ids.get("eos")]
    return dict(zip(("eot", "eom"), (index for index in unknown if tokens[index] not in _KNOWN_ENDS), strict=False))


def _unsupported(value: object, problem: str) -> InputError:
    return InputError("tokenizer", value, f"{problem}: llama.cpp would tokenise differently", _REMEDY)
