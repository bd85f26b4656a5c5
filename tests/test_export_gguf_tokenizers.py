"""Tokenizers in GGUF files: what llama.cpp would read is what tokenizer.json says, or the export is refused."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from export_cases import (
    POLICIES,
    bpe_tokenizer,
    even,
    gemma_tokenizer,
    prune_to,
    sentencepiece_tokenizer,
    write_random,
)
from factories import byte_tokenizer
from gguf_cases import (
    BYTE_LEVEL,
    IGNORING_MERGES,
    PRE_TOKENIZERS,
    QWEN2,
    split,
    written,
)
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ppf.deliver.export import open_source, to_gguf
from ppf.deliver.export.gguf_metadata import model_name
from ppf.deliver.export.gguf_tokenizer import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED, vocabulary
from ppf.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_bpe(name, tmp_path):
    tokenizer = bpe_tokenizer(PRE_TOKENIZERS[name], ignore_merges=name in IGNORING_MERGES)
    fields = written(write_random(tmp_path / "in", tokenizer=tokenizer), tmp_path / "out").fields
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == name
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:2] == ["<s>", "</s>"] and tokens[290:] == [f"[PAD{index}]" for index in range(290, 300)]
    assert types[:2] == [CONTROL] * 2 and set(types[290:]) == {UNUSED}
    assert all(tokens[index] == token for token, index in tokenizer.get_vocab().items())
    assert fields["tokenizer.ggml.bos_token_id"] == 0 and fields["tokenizer.ggml.eos_token_id"] == 1
    assert not fields["tokenizer.ggml.add_bos_token"] and not fields["tokenizer.ggml.add_eos_token"]
    merged = [merge.replace(" ", "") for merge in fields["tokenizer.ggml.merges"]]
    assert merged == tokens[258:290] and "tokenizer.ggml.scores" not in fields


def test_begin_token_is_added_if_the_tokenizer_adds_it(tmp_path):
    fields = written(prune_to(tmp_path / "in", POLICIES[0.3]), tmp_path / "out").fields
    assert fields["tokenizer.ggml.add_bos_token"] and not fields["tokenizer.ggml.add_eos_token"]


@pytest.mark.parametrize("metaspace", [False, True])
def test_sentencepiece(metaspace, tmp_path):
    tokenizer = sentencepiece_tokenizer(metaspace)
    source = write_random(tmp_path / "in", tokenizer=tokenizer, vocab_size=480)
    fields = written(source, tmp_path / "out").fields
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"]
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]) > 100
    assert types[:3] == [CONTROL, CONTROL, UNKNOWN] and tokens[3] == "<0x00>" and set(types[3:259]) == {BYTE}
    text = "The river ran past old stone walls at dawn"
    assert merge_by_score(text, tokens, fields["tokenizer.ggml.scores"]) == tokenizer.tokenize(text)


def test_gemmas_sentencepiece_puts_no_space_in_front(tmp_path):
    tokenizer = gemma_tokenizer()
    source = write_random(tmp_path / "in", even("gemma3_text"), tokenizer, "gemma3_text", vocab_size=480)
    fields = written(source, tmp_path / "out").fields
    assert fields["tokenizer.ggml.model"] == "llama" and not fields["tokenizer.ggml.add_space_prefix"]
    text, tokens = "river ran past old stone walls", fields["tokenizer.ggml.tokens"]
    assert merge_by_score(text, tokens, fields["tokenizer.ggml.scores"], "") == tokenizer.tokenize(text)


def merge_by_score(text: str, tokens: list[str], scores: list[float], begin: str = "▁") -> list[str]:
    """SentencePiece's rule: of all neighbours that join to a token, those with the highest score first."""
    score, pieces = dict(zip(tokens, scores, strict=True)), list(begin + text.replace(" ", "▁"))
    while True:
        joined = [(score.get(a + b, -np.inf), -index) for index, (a, b) in enumerate(pairwise(pieces))]
        best, index = max(joined, default=(-np.inf, 0))
        if best == -np.inf:
            return pieces
        pieces[-index : 2 - index] = [pieces[-index] + pieces[1 - index]]


def test_text_that_is_composed_already_is_left_as_it_is(tmp_path):
    from tokenizers.normalizers import NFC

    tokenizer = bpe_tokenizer(PRE_TOKENIZERS["qwen2"])
    tokenizer.backend_tokenizer.normalizer = NFC()
    fields = written(write_random(tmp_path / "in", tokenizer=tokenizer), tmp_path / "out").fields
    assert fields["tokenizer.ggml.pre"] == "qwen2"


def test_tokens_beyond_the_embedding(tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.add_tokens([AddedToken("<pad>", special=True), AddedToken("<mine>")])
    source = open_source(write_random(tmp_path / "in", tokenizer=tokenizer, vocab_size=291))
    words = vocabulary(source.tokenizer, source.config)
    assert words.tokens[290] == "<pad>" and len(words.tokens) == 291  # nobody writes <mine> without meaning it
    source = open_source(write_random(tmp_path / "larger", tokenizer=tokenizer))
    assert vocabulary(source.tokenizer, source.config).types[290:293] == [CONTROL, USER_DEFINED, UNUSED]
    source = open_source(write_random(tmp_path / "smaller", tokenizer=bpe_tokenizer(), vocab_size=280))
    with pytest.raises(InputError, match="the model ends at 279"):
        to_gguf(source, tmp_path / "out")


def test_phi_3_in_a_name_means_that_special_tokens_strip(tmp_path):
    """llama.cpp goes by the model's name, and does not load a vocabulary that lacks four tokens then."""
    source = open_source(write_random(tmp_path / "my-Phi-3-mini"))
    words = vocabulary(source.tokenizer, source.config)
    assert model_name("my-Phi-3-mini", words) == "my-phi_3-mini" and not words.strips_right
    tokenizer = bpe_tokenizer()
    special = [AddedToken(token, special=True, rstrip=True) for token in ("<unk>", "<|endoftext|>", "<|end|>")]
    tokenizer.add_tokens(special)
    words = vocabulary(tokenizer, source.config)
    assert words.strips_right and model_name("OUT", words) == "phi-3 OUT"


def _wordpiece() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


def _lowercase() -> PreTrainedTokenizerFast:
    from tokenizers.normalizers import Lowercase

    tokenizer = bpe_tokenizer()
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "value"),
    [
        (_wordpiece, "WordPiece"),
        (byte_tokenizer, "0 merges"),
        (_lowercase, "Lowercase"),
        (lambda: bpe_tokenizer({"type": "Whitespace"}), "Whitespace"),
        (lambda: bpe_tokenizer(BYTE_LEVEL | {"add_prefix_space": True}), "ByteLevel"),
        (lambda: bpe_tokenizer(PRE_TOKENIZERS["tekken"]), "Split"),  # merges are not ignored
        (lambda: bpe_tokenizer(split(QWEN2, "Removed")), "Split"),  # what the pattern finds is removed
        (lambda: bpe_tokenizer(split("[a-z]+")), "Split"),
        (lambda: bpe_tokenizer(byte_fallback=True), "ByteLevel"),
    ],
)
def test_tokenizers_llama_cpp_would_read_differently_are_refused(tokenizer, value, tmp_path):
    source = open_source(write_random(tmp_path / "in", tokenizer=tokenizer()))
    with pytest.raises(InputError, match="llama.cpp would tokenise differently") as caught:
        to_gguf(source, tmp_path / "out")
    assert caught.value.field == "tokenizer" and value in str(caught.value.value) and not (tmp_path / "out").exists()


def test_merges_that_no_sentencepiece_model_has_are_refused(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    first = "".join(data["model"]["merges"][0])
    data["model"]["vocab"] |= {first + first: 480, first * 3: 481}
    data["model"]["merges"] += [[first, first], [first, first + first]]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), unk_token="<unk>")
    with pytest.raises(InputError, match="lacks the merge"):
        vocabulary(tokenizer, open_source(write_random(tmp_path / "in", vocab_size=482)).config)
