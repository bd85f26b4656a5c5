"""Texts become token sequences; every mistake is named."""

import pytest
import torch
from factories import byte_tokenizer, write_text

from ppf.errors import InputError
from ppf.families import families, family_of
from ppf.text import BATCH_TOKENS, batches, begin_token, pack, read_tokens, split, take_tokens


def test_read_tokens_gives_the_bytes_of_the_text(tmp_path):
    path = write_text(tmp_path / "text.txt", words=50)
    tokenizer = byte_tokenizer()
    tokens = read_tokens(path, tokenizer)
    assert tokens.dtype == torch.int64 and len(tokens) == path.stat().st_size
    assert tokenizer.decode(tokens) == path.read_text()
    (tmp_path / "accents.txt").write_text("naïve – café", encoding="utf-8")
    assert tokenizer.decode(read_tokens(tmp_path / "accents.txt", tokenizer)) == "naïve – café"


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read"), (b"", "is empty"), (b" \n\t ", "is empty"), (b"\xff\xfe\x00d", "not UTF-8")],
)
def test_unreadable_texts_are_refused(tmp_path, content, problem):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=problem) as caught:
        read_tokens(path, byte_tokenizer())
    assert caught.value.field == "text" and caught.value.value == path


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_tokens(tmp_path, byte_tokenizer())


def test_pack_cuts_and_drops_the_tail():
    sequences = pack(torch.arange(23), 5)
    assert torch.equal(sequences, torch.arange(20).view(4, 5))
    assert pack(torch.arange(5), 5).shape == (1, 5)


def test_pack_refuses():
    with pytest.raises(InputError, match="4 tokens.*shorter than one sequence.*at least 5") as caught:
        pack(torch.arange(4), 5, "eval-text")
    assert caught.value.field == "eval-text"
    for length in (1, 0, -3):
        with pytest.raises(InputError) as caught:
            pack(torch.arange(9), length)
        assert caught.value.field == "sequence-length"


def test_pack_puts_the_begin_token_in_front_of_every_sequence():
    sequences = pack(torch.arange(100, 123), 5, begin=7)
    assert sequences.dtype == torch.int64 and sequences.shape == (5, 5)
    assert torch.equal(sequences[:, 0], torch.full((5,), 7))
    assert torch.equal(sequences[:, 1:].flatten(), torch.arange(100, 120))
    assert pack(torch.arange(4), 5, begin=0).tolist() == [[0, 0, 1, 2, 3]]
    assert pack(torch.arange(3), 2, begin=9).tolist() == [[9, 0], [9, 1], [9, 2]]
    with pytest.raises(InputError, match="3 tokens.*at least 4"):
        pack(torch.arange(3), 5, begin=0)


@pytest.mark.parametrize("family", families(), ids=lambda family: family.model_type)
def test_families_say_which_sequences_begin(family):
    tokenizer = byte_tokenizer()
    begin = begin_token(family, tokenizer)
    assert begin == (256 if family.model_type in ("gemma2", "gemma3_text") else None)


def test_a_family_that_needs_a_begin_token_refuses_tokenizers_without_one():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    assert begin_token(family_of("llama"), tokenizer) is None
    with pytest.raises(InputError, match="no begin token.*gemma2"):
        begin_token(family_of("gemma2"), tokenizer)


def test_tokens_outside_the_vocabulary_are_refused(tmp_path):
    path, tokenizer = write_text(tmp_path / "text.txt", words=50), byte_tokenizer()
    highest = int(read_tokens(path, tokenizer).max())
    assert len(read_tokens(path, tokenizer, highest + 1)) == path.stat().st_size
    with pytest.raises(InputError, match=f"token {highest} .*ends at {highest - 1}") as caught:
        read_tokens(path, tokenizer, highest)
    assert caught.value.field == "text" and caught.value.value == path


@pytest.mark.parametrize(("tokens", "count"), [(None, 100), (1, 1), (80, 8), (89, 8), (1000, 100), (99999, 100)])
def test_take_tokens_spreads_over_the_text(tokens, count):
    sequences = torch.arange(1000).view(100, 10)
    taken = take_tokens(sequences, tokens)
    assert taken.shape == (count, 10)
    places = taken[:, 0] // 10
    assert places.unique().numel() == count and places[0] == 0
    assert places[-1] >= 100 - 2 * 100 // count


@pytest.mark.parametrize("tokens", [0, -5])
def test_take_tokens_refuses(tokens):
    with pytest.raises(InputError, match="leaves nothing"):
        take_tokens(torch.zeros(3, 4), tokens)


@pytest.mark.parametrize("total", [2, 3, 4, 7, 100])
@pytest.mark.parametrize(("calibration", "evaluation"), [(10**9, 10**9), (30, 20), (1, 1)])
def test_split_parts_share_no_sequence(total, calibration, evaluation):
    sequences = torch.arange(total * 10).view(total, 10)
    parts = split(sequences, calibration, evaluation)
    assert len(parts.calibration) and len(parts.evaluation)
    assert parts.calibration.max() < parts.evaluation.min()
    if calibration > total * 10:
        assert torch.equal(torch.cat((parts.calibration, parts.evaluation)), sequences)


def test_split_refuses_one_sequence():
    with pytest.raises(InputError, match="too short to split"):
        split(torch.zeros(1, 10), 5, 5)


@pytest.mark.parametrize("tokens", [1, 10, 35, 10**6])
def test_batches_cover_everything_in_order(monkeypatch, tokens):
    monkeypatch.setitem(BATCH_TOKENS, "cpu", tokens)
    sequences = torch.arange(170).view(17, 10)
    parts = batches(sequences, torch.device("cpu"))
    assert torch.equal(torch.cat(list(parts)), sequences)
    assert all(len(part) <= max(1, tokens // 10) for part in parts)
