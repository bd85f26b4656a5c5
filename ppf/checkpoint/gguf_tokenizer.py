"""The tokenizer of a GGUF file, made of the vocabulary in it as llama.cpp reads that (src/llama-vocab.cpp).

transformers has converters of its own, but what they make of one file depends on transformers' version: 5.17 swaps the
begin and the end token and splits SentencePiece's words otherwise, 5.24 does not know SmolLM's digits. Kinds that are
not known here are refused: wrong tokens would show in nothing but worse figures.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import msgspec
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import InputError, shown
from ..storage.schemas import Finite, convert_to
from .gguf_bounds import DAMAGED
from .gguf_header import REMEDY
from .gguf_vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SYNONYMS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    pre_tokenizer,
)

_PREFIX, _TEMPLATE = "tokenizer.ggml.", "tokenizer.chat_template"
# llama.cpp puts a begin token before texts of these, and of SentencePiece, if a file does not say.
_BEGINNING = {"llama-bpe", "tekken"}
# Qwen's own tokenizers compose characters first, which no file says.
_COMPOSING = {"qwen2"}
# Names of models whose special tokens swallow the white space behind them, and those that do not.
_SWALLOWING, _KEEPING = re.compile("phi-?3", re.IGNORECASE), {"<unk>", "<s>", "<|endoftext|>"}
_BYTE = re.compile("<0x([0-7][0-9A-F])>")
# More than any piece has that is learned from text; cutting one in two takes time by the square of it.
_LONGEST_PIECE = 1_024


class _Words(msgspec.Struct, rename=lambda name: f"{_PREFIX}{name}"):
    """The fields of a file that say something about tokens."""

    model: str
    tokens: Annotated[list[str], msgspec.Meta(min_length=1)]
    pre: str = ""
    token_type: list[int] | None = None
    scores: list[Finite] | None = None
    merges: list[str] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    unknown_token_id: int | None = None
    padding_token_id: int | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool = False
    add_space_prefix: bool = True

    @property
    def types(self) -> list[int]:
        return self.token_type or [NORMAL] * len(self.tokens)

    def named(self) -> dict[str, str]:
        """Special tokens by transformers' names for them."""
        ids = {
            "bos_token": self.bos_token_id,
            "eos_token": self.eos_token_id,
            "unk_token": self.unknown_token_id,
            "pad_token": self.padding_token_id,
        }
        return {name: self.tokens[index] for name, index in ids.items() if index is not None}


def tokenizer_of(file: Path, reader: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of ``file``, which gguf's ``reader`` has open.

    Raises ``InputError`` for kinds of tokenizers that PPF does not read, and for a vocabulary that contradicts itself.
    """
    fields = _fields(file, reader)
    words = convert_to(_Words, "GGUF file", file, fields, DAMAGED)
    _require_whole(file, words)
    if words.model == "gpt2":
        made, begins = _byte_level(file, words), SYNONYMS.get(words.pre, words.pre) in _BEGINNING
    elif words.model == "llama":
        made, begins = _sentencepiece(file, words), True
    else:
        raise _refused(file, "model", words.model, "PPF reads the tokenizers gpt2 and llama only")
    made.post_processor = _around(file, words, begins if words.add_bos_token is None else words.add_bos_token)
    _add_tokens(made, words, bool(_SWALLOWING.search(str(fields.get("general.name", "")))))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        chat_template=_templates(file, fields),
        clean_up_tokenization_spaces=False,
        **words.named(),
    )


def _fields(file: Path, reader: Any) -> dict[str, Any]:
    wanted = {f"{_PREFIX}{name}" for name in _Words.__struct_fields__} | {"general.name"}
    try:
        return {
            name: field.contents()
            for name, field in reader.fields.items()
            if name in wanted or name.startswith(_TEMPLATE)
        }
    except UnicodeDecodeError as error:
        raise InputError("GGUF file", file, f"has a token that is not UTF-8 ({error})", DAMAGED) from None


def _require_whole(file: Path, words: _Words) -> None:
    """Raise ``InputError`` unless every token has a type, a score and a text of its own, and every id a token."""
    count = len(words.tokens)
    for name, values in (("token_type", words.token_type), ("scores", words.scores)):
        if values is not None and len(values) != count:
            raise _refused(file, name, f"{len(values):,} items", f"there are {count:,} tokens")
    for name in ("bos", "eos", "unknown", "padding"):
        index = getattr(words, f"{name}_token_id")
        if index is not None and not 0 <= index < count:
            raise _refused(file, f"{name}_token_id", index, f"there are {count:,} tokens")
    token, times = Counter(words.tokens).most_common(1)[0]
    if times > 1:
        raise _refused(file, "tokens", token, f"stands there {times} times")


def _byte_level(file: Path, words: _Words) -> Tokenizer:
    """BPE on the bytes of words."""
    name = SYNONYMS.get(words.pre, words.pre)
    if name not in PRE_TOKENIZERS:
        problem = f"PPF knows how {', '.join(sorted(PRE_TOKENIZERS.keys() | SYNONYMS.keys()))} split text"
        raise _refused(file, "pre", words.pre or "(none)", problem)
    steps, ignore_merges = PRE_TOKENIZERS[name]
    merges = [
        (merge[:1] + left, right) for merge in words.merges or () for left, _, right in [merge[1:].partition(" ")]
    ]
    tokenizer = Tokenizer(_bpe(file, _ids(words.tokens, words), merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer(steps), decoders.ByteLevel()
    if words.pre in _COMPOSING:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    """The two parts of a merge; the first character may be a space of its own."""
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right


def _sentencepiece(file: Path, words: _Words) -> Tokenizer:
    """BPE on characters, ▁ for spaces, bytes for characters that are no token."""
    if words.scores is None:
        raise _refused(file, "scores", "(none)", "SentencePiece joins pieces in the order of their scores")
    tokens = _spelled(words)
    merges = _merges(file, tokens, words)
    unknown = words.named().get("unk_token")
    tokenizer = Tokenizer(_bpe(file, _ids(tokens, words), merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    spaces, back = [normalizers.Replace(" ", "▁")], [decoders.Replace("▁", " "), decoders.ByteFallback()]
    if words.add_space_prefix:
        spaces.insert(0, normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    strip = [decoders.Strip(" ", 1, 0)] if words.add_space_prefix else []
    tokenizer.decoder = decoders.Sequence([*back, decoders.Fuse(), *strip])
    return tokenizer


def _bpe(file: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary, merges=merges, **options)
    except Exception as error:  # tokenizers raises bare ones, about merges of what is no token
        problem = f"has merges that do not fit its tokens ({shown(' '.join(str(error).split()), 200)})"
        raise InputError("GGUF file", file, problem, DAMAGED) from None


def _ids(tokens: list[str], words: _Words) -> dict[str, int]:
    """Every token's id. Unused ones at the end only fill up the model's embedding; one in between stays, since
    tokenizers warns of holes."""
    named = set(words.named().values())
    used = (index for index, kind in enumerate(words.types) if kind != UNUSED or tokens[index] in named)
    return {token: index for index, token in enumerate(tokens[: max(used, default=-1) + 1])}


def _spelled(words: _Words) -> list[str]:
    """The tokens as a text with ▁ for spaces has them.

    Runs of spaces stand in files as they are. And an ASCII character that pieces are made of, but that is no piece
    itself (Gemma's tabulator), is its byte: BPE joins only what has a spelling.
    """
    tokens = ["▁" * len(token) if token.strip(" ") == "" else token for token in words.tokens]
    known = set(tokens)
    within = {
        character for token, kind in zip(tokens, words.types, strict=True) if kind == NORMAL for character in token
    }
    for index, (token, kind) in enumerate(zip(tokens, words.types, strict=True)):
        byte = _BYTE.fullmatch(token) if kind == BYTE else None
        if byte and (letter := chr(int(byte[1], 16))) in within - known:
            tokens[index] = letter
    return tokens


def _merges(file: Path, tokens: list[str], words: _Words) -> list[tuple[str, str]]:
    """All pairs of tokens that join to a piece, the best piece first.

    A run of spaces comes before everything, the shorter first: those are pieces that Gemma's makers chose, and no score
    of theirs was learned.
    """
    kinds = dict(zip(tokens, words.types, strict=True))
    runs = [token for token in tokens if kinds[token] == USER_DEFINED and token.strip("▁") == ""]
    scores = zip(tokens, words.scores, strict=True)
    learned = [token for token, _ in sorted(scores, key=lambda item: -item[1]) if kinds[token] == NORMAL]
    if any(len(piece) > _LONGEST_PIECE for piece in learned):
        raise _refused(file, "tokens", max(learned, key=len)[:80], f"has more than {_LONGEST_PIECE:,} characters")
    found = []
    for piece in [*sorted(runs, key=len), *learned]:
        # Of equals, what SentencePiece would find first from the left: the longest left part.
        pairs = ((piece[:cut], piece[cut:]) for cut in range(len(piece) - 1, 0, -1))
        found += [pair for pair in pairs if kinds.get(pair[0], UNUSED) != UNUSED != kinds.get(pair[1], UNUSED)]
    return found


def _around(file: Path, words: _Words, begins: bool) -> processors.TemplateProcessing:
    """What puts the begin token before a text and the end token behind it."""
    used = {}
    for name, wanted in (("bos", begins), ("eos", words.add_eos_token)):
        index = getattr(words, f"{name}_token_id")
        if wanted and index is None:
            raise _refused(file, f"{name}_token_id", "(none)", "is put around every text, so the file must name it")
        if wanted:
            used[name] = {"id": name, "ids": [index], "tokens": [words.tokens[index]]}
    begin, end = ([f"{name}:{{}}"] if name in used else [] for name in ("bos", "eos"))
    one, two = ([piece.format(part) for piece in (*begin, f"${text}:{{}}", *end)] for part, text in enumerate("AB"))
    return processors.TemplateProcessing(single=one, pair=one + two, special_tokens=list(used.values()))


def _add_tokens(tokenizer: Tokenizer, words: _Words, swallow: bool) -> None:
    """Tokens that are found in a text before anything else is done to it; special ones are those that the file names
    or calls so. Who has ``swallow`` takes the white space behind them along."""
    named, found = set(words.named().values()), {True: [], False: []}
    for token, kind in zip(words.tokens, words.types, strict=True):
        special = kind in (CONTROL, UNKNOWN) or token in named
        if (special or kind == USER_DEFINED) and token.strip(" "):
            strip = swallow and token not in _KEEPING
            found[special].append(AddedToken(token, normalized=False, special=special, rstrip=strip))
    tokenizer.add_special_tokens(found[True])
    tokenizer.add_tokens(found[False])


def _templates(file: Path, fields: dict[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by their names."""
    mark = f"{_TEMPLATE}."
    found = {name.removeprefix(mark): text for name, text in fields.items() if name.startswith(mark)}
    if _TEMPLATE in fields:
        found = {"default": fields[_TEMPLATE]} | found
    found = convert_to(dict[str, str], "GGUF file", file, found, DAMAGED)
    return found["default"] if found.keys() == {"default"} else found or None


def _refused(file: Path, name: str, value: object, problem: str) -> InputError:
    return InputError(f"GGUF {_PREFIX}{name}", value, f"{problem} ({file})", REMEDY)
