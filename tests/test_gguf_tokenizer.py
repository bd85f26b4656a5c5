"""Tokenizers of GGUF files: the one that was exported comes back, whatever converters transformers has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from export_cases import SAMPLE, bpe_tokenizer, gemma_tokenizer, sentencepiece_tokenizer
from factories import config_of
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import AddedToken, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from ppf.checkpoint.gguf_tokenizer import tokenizer_of
from ppf.checkpoint.gguf_vocabulary import PRE_TOKENIZERS, pre_tokenizer
from ppf.deliver.export.gguf_metadata import describe_tokenizer
from ppf.deliver.export.gguf_tokenizer import vocabulary
from ppf.errors import InputError

HARD = "I'LL pay 12345 for 3.14 HelloWORLD/\n\n \n  \tx  don't  e\u0301 äöü 日本 🙂\r\n<s> </s> y "
DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def through_a_file(tokenizer: PreTrainedTokenizerBase, folder: Path, name: str = "some") -> PreTrainedTokenizerBase:
    """``tokenizer`` as our exporter writes it for a model of that name, read back."""
    words = vocabulary(tokenizer, config_of("llama", vocab_size=len(tokenizer) + 7, bos_token_id=0, eos_token_id=1))
    writer = GGUFWriter(folder / "words.gguf", "llama")
    writer.add_name(name)
    describe_tokenizer(writer, words)
    return read(writer, folder)


def read(writer: GGUFWriter, folder: Path) -> PreTrainedTokenizerBase:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tokenizer_of(folder / "words.gguf", GGUFReader(folder / "words.gguf"))


def same(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, *texts: str) -> None:
    for text in (*texts, HARD, SAMPLE.read_text(encoding="utf-8")[:3000], " two", ""):
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours("a", "b")["input_ids"] == theirs("a", "b")["input_ids"]
    assert len(ours) == len(theirs)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_words_are_split_as_the_name_says(tmp_path, name):
    steps, ignores = PRE_TOKENIZERS[name]
    theirs = bpe_tokenizer(json.loads(pre_tokenizer(steps).__getstate__()), ignore_merges=ignores)
    if name == "qwen2":
        theirs.backend_tokenizer.normalizer = normalizers.NFC()
    ours = through_a_file(theirs, tmp_path)
    same(ours, theirs)
    ours, theirs = ours.backend_tokenizer, theirs.backend_tokenizer
    assert ours.pre_tokenizer.pre_tokenize_str(HARD) == theirs.pre_tokenizer.pre_tokenize_str(HARD)
    assert ours.model.ignore_merges == ignores


def test_digits_stay_alone_where_the_file_says_so(tmp_path):
    """What transformers 5.24 makes of SmolLM's files does not."""
    ours = through_a_file(bpe_tokenizer(DIGITS), tmp_path).backend_tokenizer
    words = [word for word, _ in ours.pre_tokenizer.pre_tokenize_str("of 123")]
    assert words == ["of", "Ġ", "1", "2", "3"]


@pytest.mark.parametrize("make", [bpe_tokenizer, sentencepiece_tokenizer, gemma_tokenizer])
def test_added_tokens_and_begin_and_end(tmp_path, make):
    theirs = make()
    theirs.add_special_tokens({"extra_special_tokens": ["<|mine|>"]})
    theirs.add_tokens([AddedToken("<tool>", normalized=False)])
    theirs.chat_template = {"default": "{{ one }}", "tool_use": "{{ two }}"}
    around = {
        "single": "<s> $A </s>",
        "pair": "<s> $A </s> <s>:1 $B:1 </s>:1",
        "special_tokens": [("<s>", 0), ("</s>", 1)],
    }
    theirs.backend_tokenizer.post_processor = TemplateProcessing(**around)
    ours = through_a_file(theirs, tmp_path)
    same(ours, theirs, "a<|mine|> b<tool>c <tool> d", "<|mine|>\n\n x")
    text = "a<|mine|><tool>"
    assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True).endswith("a<tool>")
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_special_tokens_of_phi3_swallow_white_space(tmp_path):
    theirs = sentencepiece_tokenizer()
    theirs.add_special_tokens({"extra_special_tokens": [AddedToken("<|user|>", rstrip=True, normalized=False)]})
    ours = through_a_file(theirs, tmp_path, "Phi-3 mini")
    for text in ("<|user|>\n \nhi", "<s> hi"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert through_a_file(theirs, tmp_path)("<|user|>\nhi")["input_ids"] != theirs("<|user|>\nhi")["input_ids"]


def of_gemma(writer: GGUFWriter) -> list[str]:
    """A vocabulary with what files of Gemma have: runs of spaces as they are, whose score is no place in the order of
    merges, and pieces of tabulators, which are no piece themselves."""
    fixed = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "  ", "   "]
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    learned = ["\t\t", "▁b", "==", "===", "a", "b", "=", "▁"]
    kinds = [TokenType.CONTROL] * 3 + [TokenType.UNKNOWN] + [TokenType.USER_DEFINED] * 3 + [TokenType.BYTE] * 256
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words := fixed + octets + learned)
    writer.add_token_types(kinds + [TokenType.NORMAL] * len(learned))
    writer.add_token_scores([-1000.0] * 7 + [0.0] * 256 + [-float(index) for index in range(len(learned))])
    writer.add_add_space_prefix(False)
    for add, index in ((writer.add_bos_token_id, 2), (writer.add_eos_token_id, 1), (writer.add_unk_token_id, 3)):
        add(index)
    return words


def test_a_vocabulary_like_gemmas(tmp_path):
    words = of_gemma(writer := GGUFWriter(tmp_path / "words.gguf", "gemma3"))
    ours = read(writer, tmp_path)
    cases = {
        "a  b": ["a", "  ", "b"],  # not ▁ and ▁b, which has the better score
        "a   b b": ["a", "   ", "b", "▁b"],
        "a\t\t\tb": ["a", "\t\t", "<0x09>", "b"],
        "\n\n\n": ["\n\n", "<0x0A>"],
        "=====": ["==", "==="],
        "ä": ["<0xC3>", "<0xA4>"],
    }
    for text, expected in cases.items():
        ids = ours(text)["input_ids"]
        assert ids == [2, *map(words.index, expected)], text  # SentencePiece has a begin token unless a file says no
        assert ours.decode(ids[1:]) == text


@pytest.mark.parametrize("name", ["bos", "eos"])
def test_a_token_around_texts_that_has_no_name(tmp_path, name):
    writer = GGUFWriter(tmp_path / "words.gguf", "gemma3")
    of_gemma(writer)
    del writer.kv_data[0][f"tokenizer.ggml.{name}_token_id"]
    writer.add_add_eos_token(True)
    with pytest.raises(InputError, match=rf"tokenizer.ggml.{name}_token_id = \(none\)"):
        read(writer, tmp_path)
