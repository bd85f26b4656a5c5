"""Texts of every kind: files, compressed ones, datasets, chats, pipes, standard input, Python's own objects."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import threading

import datasets
import fresh
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from cli_cases import answer, refusal
from factories import byte_tokenizer, write_checkpoint, write_text
from local_datasets import serving

import ppf
from ppf.checkpoint.hashes import sha256_of
from ppf.errors import InputError
from ppf.text import Text, packing, read, read_tokens, tokens

DOCUMENTS = ["The river ran past.", "Old stone – walls.", "Dawn\nand dusk."]
CHATS = [
    [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
    [{"role": "user", "content": "When?"}, {"role": "assistant", "content": "Now."}],
]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
SMALL = ["--sequence-length", 32, "--device", "cpu"]
QUICK = [*SMALL, "--evaluations", 24, "--ffn-multiple", 8, "--calibration-tokens", 2048, "--evaluation-tokens", 512]


def rows(documents=DOCUMENTS, field="text"):
    return [{"id": number, field: document} for number, document in enumerate(documents)]


def lines(documents=DOCUMENTS, field="text"):
    return "".join(json.dumps(row) + "\n" for row in rows(documents, field)).encode()


def parquet(documents=DOCUMENTS, field="text"):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(documents, field)), file)
    return file.getvalue()


def expected(documents=DOCUMENTS, tokenizer=None):
    """By hand: every document's bytes, then the end token."""
    tokenizer = tokenizer or byte_tokenizer()
    ids = [tokenizer(document, add_special_tokens=False)["input_ids"] + [257] for document in documents]
    return torch.tensor([id for document in ids for id in document])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / "model")


CONTENTS = {
    ".jsonl": lines,
    ".ndjson": lines,
    ".json": lambda: json.dumps(rows()).encode(),
    ".parquet": parquet,
}
COMPRESSED = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("suffix", CONTENTS)
def test_every_format_gives_the_same_documents(tmp_path, suffix, compression):
    path = tmp_path / f"corpus{suffix}{compression}"
    path.write_bytes(COMPRESSED[compression](CONTENTS[suffix]()))
    found = read(Text(path), byte_tokenizer())
    assert torch.equal(found.ids.long(), expected()) and found.ids.dtype == torch.int32
    assert found.read_as["documents"] == 3 and found.read_as["joined"] == "token 257" and found.whole
    assert found.read_as["format"].endswith(compression) and found.read_as["field"] == "text"


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_compressed_plain_text_is_plain_text(tmp_path, compression):
    plain = write_text(tmp_path / "text.txt")
    packed = tmp_path / f"text.txt{compression}"
    packed.write_bytes(COMPRESSED[compression](plain.read_bytes()) + COMPRESSED[compression](b" and more"))
    assert torch.equal(
        read_tokens(packed, byte_tokenizer())[: len(plain.read_bytes())], read_tokens(plain, byte_tokenizer())
    )
    assert byte_tokenizer().decode(read_tokens(packed, byte_tokenizer())).endswith(" and more")
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(InputError, match="ends early"):
        read_tokens(packed, byte_tokenizer())


def test_json_lines_called_json_are_read_as_such(tmp_path):
    (tmp_path / "a.json").write_bytes(lines())
    assert torch.equal(read_tokens(tmp_path / "a.json", byte_tokenizer()), expected())


def test_a_byte_order_mark_is_no_token(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfriver")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines())
    assert byte_tokenizer().decode(read_tokens(tmp_path / "text.txt", byte_tokenizer())) == "river"
    assert torch.equal(read_tokens(tmp_path / "a.jsonl", byte_tokenizer()), expected())


def test_without_an_end_token_a_blank_line_joins(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    found = read(Text(["a", "b"]), tokenizer)
    assert tokenizer.decode(found.ids) == "a\n\nb\n\n" and found.read_as["joined"] == "a blank line"


def test_chats_go_through_the_models_template(tmp_path):
    (tmp_path / "chats.jsonl").write_bytes(lines(CHATS, "messages"))
    (tmp_path / "chats.parquet").write_bytes(parquet(CHATS, "messages"))
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match="no chat template"):
        read(Text(tmp_path / "chats.jsonl", "messages"), tokenizer)
    tokenizer.chat_template = TEMPLATE
    found = read(Text(tmp_path / "chats.jsonl", "messages"), tokenizer)
    assert tokenizer.decode(found.ids) == "<user>Why?\n<assistant>So.\n<user>When?\n<assistant>Now.\n"
    assert found.read_as["joined"].startswith("chat template ")
    assert torch.equal(read(Text(tmp_path / "chats.parquet", "messages"), tokenizer).ids, found.ids)
    assert torch.equal(read(Text(CHATS), tokenizer).ids, found.ids)


def test_no_more_is_read_than_is_needed():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield "The river ran past."

    found = read(Text(endless()), byte_tokenizer(), most=1000)
    assert 1000 <= len(found.ids) < 1020 and len(taken) < 200 and not found.whole
    assert found.read_as["documents"] == 50
    again = read(Text(["The river ran past."] * 50), byte_tokenizer())
    assert again.sha256 == found.sha256  # of what was read


def test_tokens_from_python():
    whole = read(Text(torch.arange(12).view(3, 4)), byte_tokenizer())
    assert whole.ids.shape == (3, 4)
    ids = torch.arange(12)
    assert read(Text(ids), byte_tokenizer()).sha256 == hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    assert read(Text([[1, 2], torch.tensor([3])]), byte_tokenizer()).ids.tolist() == [1, 2, 3]
    for given, problem in (
        (torch.ones(3), "no token ids"),
        (torch.tensor([1, -1]), "no token"),
        ([], "is empty"),
        ([""], "is empty"),
        ([object()], "neither strings, chats nor token ids"),
        (3, "neither a path nor an iterable"),
    ):
        with pytest.raises(InputError, match=problem):
            read(Text(given), byte_tokenizer(), 258)


def test_a_folder_is_a_dataset(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_bytes(lines())
    (tmp_path / "folder" / "test.jsonl").write_bytes(lines(DOCUMENTS[:1]))
    found = read(Text(tmp_path / "folder"), byte_tokenizer())
    assert torch.equal(found.ids.long(), expected()) and found.read_as["split"] == "train"
    test = read(Text(tmp_path / "folder", split="test"), byte_tokenizer())
    assert torch.equal(test.ids.long(), expected(DOCUMENTS[:1]))
    with pytest.raises(InputError, match="dev.*--split"):
        read(Text(tmp_path / "folder", split="dev"), byte_tokenizer())
    saved = datasets.Dataset.from_list(rows())
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "saved")
    assert torch.equal(read_tokens(tmp_path / "saved", byte_tokenizer()), expected())
    assert torch.equal(read(Text(saved), byte_tokenizer()).ids.long(), expected())
    with pytest.raises(InputError, match="no split 'dev'; there are: train"):
        read(Text(tmp_path / "saved", split="dev"), byte_tokenizer())


@pytest.mark.parametrize(
    ("name", "content", "field", "problem"),
    [
        ("a.jsonl", lines(field="body"), None, "no field 'text' in row 1; there are: id, body"),
        ("a.parquet", parquet(field="body"), None, "no field 'text' in row 1; there are: id, body"),
        ("a.jsonl", lines(), "id", "holds a number in row 1"),
        ("a.jsonl", lines([None]), None, "nothing"),
        ("a.jsonl", lines([DOCUMENTS[0], CHATS[0]]), None, "texts and chats"),
        ("a.jsonl", lines() + b"{", None, "line 4 is not JSON"),
        ("a.jsonl", b'"text"\n', None, "row 1 is a string, not an object"),
        ("a.json", b"[1", None, "is not JSON"),
        ("a.jsonl", b"", None, "is empty"),
        ("a.jsonl", lines([" "]), None, "is empty"),
        ("a.parquet", b"PAR1", None, "is not readable as Parquet"),
        ("a.jsonl", gzip.compress(lines(), mtime=0), None, "gzip data.*ends in .gz"),
        ("a.txt", zstandard.compress(b"river"), None, "zstd data"),
        ("a.txt", parquet(), None, "Parquet data"),
        ("a.txt", b"river\0", None, "binary data"),
        ("a.txt", b"river" * 2000 + b"\xff", None, "not UTF-8"),
        ("a.txt.gz", b"river", None, "is not gzip data"),
        ("a.txt.zst", b"river", None, "not zstd data"),
        ("a.txt.gz", gzip.compress(b"river" * 100, mtime=0)[:-9], None, "ends early"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused_in_one_line(tmp_path, name, content, field, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=problem) as caught:
        read(Text(tmp_path / name, field), byte_tokenizer(), field="eval-text")
    assert caught.value.field == "eval-text" and "\n" not in str(caught.value)


def test_ids_on_the_hub_are_told_from_missing_files(tmp_path, monkeypatch):
    for name in ("org/name", "org/name.v2:config-1"):
        assert Text(name).is_hub and Text(name).path is None
    for name in ("data/calib.txt", "/nowhere/data", "../data/a", "corpus", "a/b/c", "a/b.jsonl.gz"):
        assert not Text(name).is_hub
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("river")
    monkeypatch.chdir(tmp_path)
    assert Text("org/name").is_file


def test_a_dataset_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be read as a dataset.*hf auth login") as caught:
        read(Text("nobody/has-this"), byte_tokenizer())
    assert caught.value.value == "nobody/has-this"


def test_a_dataset_of_a_hub_is_streamed(model, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train.jsonl").write_bytes(lines(DOCUMENTS * 1000, "body"))
    (tmp_path / "corpus" / "test.jsonl").write_bytes(lines(DOCUMENTS * 20, "body"))
    asked = [
        ["org/corpus", "--field", "body", "--tokens", 640],
        ["org/corpus", "--field", "body", "--split", "test"],
        ["org/corpus", "--split", "dev"],
        ["org/corpus"],
        ["org/other"],
    ]
    with serving("org/corpus", tmp_path / "corpus") as address:
        data, test, split, field, missing = asked_of(address, model, tmp_path, asked)
    (tmp_path / "a.jsonl").write_bytes(lines(DOCUMENTS * 20))
    direct = answer("eval", model, "--text", tmp_path / "a.jsonl", *SMALL)
    assert test["log_perplexity"] == direct["log_perplexity"] and test["protocol"]["text"] == "org/corpus"
    read_as = {"format": "dataset", "field": "body", "split": "test", "documents": 60, "joined": "token 257"}
    assert test["protocol"]["read_as"] == read_as
    assert data["protocol"]["part"] == "its beginning" and data["protocol"]["read_as"]["documents"] < 40
    split, field, missing = (refused["error"] for refused in (split, field, missing))
    assert "dev" in split["problem"] and "--split" in split["remedy"] and split["value"] == "org/corpus"
    assert "there are: id, body" in field["problem"]
    assert "org/other" in missing["value"] and "Check the name" in missing["remedy"]


# huggingface_hub and datasets read their environment when they are imported.
_ASK = """
import json, sys
from typer.testing import CliRunner
from ppf.cli import app
for arguments in json.loads(sys.argv[1]):
    print(json.dumps(json.loads(CliRunner().invoke(app, arguments).stdout)))
"""


def asked_of(address, model, tmp_path, texts):
    """What ``ppf eval --json`` says of each of ``texts`` with their options, in a process whose hub is ``address``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = inherited | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
    arguments = [list(map(str, ["eval", model, "--text", *text, *SMALL, "--json"])) for text in texts]
    command = [sys.executable, "-c", _ASK, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_missing_packages_say_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.parquet").write_bytes(parquet())
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"river"))
    for package, place in (("datasets", "folder"), ("pyarrow", "a.parquet"), ("zstandard", "a.txt.zst")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(InputError, match=rf"needs the package {package}.*pip install 'ppf\[data\]'"):
                read(Text(tmp_path / place), byte_tokenizer())


@pytest.mark.parametrize("model_name", ["ref-14m", "tiny-2m"])
@pytest.mark.reference
def test_a_text_in_pieces_gives_the_tokens_of_the_whole(reference, monkeypatch, model_name):
    tokenizer = ppf.checkpoint.load_tokenizer(reference / "models" / model_name)
    for name in ("sample.txt", "wiki.valid.raw"):
        text = (reference / "text" / name).read_text(encoding="utf-8")[:100_000]
        whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        monkeypatch.setattr(tokens, "_PIECE", 1000)
        assert len(list(tokens.pieces(text, tokenizer))) > 50
        assert tokens.whole(text, tokenizer).tolist() == whole


def test_a_tokenizer_that_begins_every_text_gets_it_whole():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: index for index, symbol in enumerate(["▁", "a", "\n", "<unk>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer, text = PreTrainedTokenizerFast(tokenizer_object=backend), "aaa\n" * 60_000
    assert list(tokens.pieces(text, tokenizer)) == [text]
    assert len(list(tokens.pieces(text, byte_tokenizer()))) > 2


@pytest.mark.parametrize("how", ["stdin", "fifo"])
def test_a_pipe_is_read_once_and_recorded_as_what_was_read(model, tmp_path, how):
    file = write_text(tmp_path / "text.txt")
    direct = answer("eval", model, "--text", file, *SMALL)
    data = piped(model, tmp_path, how, file.read_bytes())
    assert data["log_perplexity"] == direct["log_perplexity"]
    assert data["protocol"]["sha256"] == sha256_of(file) and data["protocol"]["tokens"] == direct["protocol"]["tokens"]
    assert "read_as" not in data["protocol"] and "read_as" not in direct["protocol"]


def piped(model, tmp_path, how, content, *more):
    """What ``ppf eval --json`` says of a pipe that holds ``content``, in a process of its own."""
    pipe = tmp_path / f"pipe{len(list(tmp_path.iterdir()))}"
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True).start()
    place, stdin = ("-", pipe) if how == "stdin" else (pipe, os.devnull)
    done = fresh.run(fresh.COMMAND, "eval", model, "--text", place, *SMALL, *more, "--json", stdin=stdin)
    return json.loads(done.stdout)


def test_a_pipe_of_json_lines_needs_the_field(model, tmp_path):
    content = lines(DOCUMENTS * 20)
    refused = piped(model, tmp_path, "stdin", content)["error"]
    assert "looks like JSON lines" in refused["problem"] and "--field" in refused["remedy"]
    data = piped(model, tmp_path, "stdin", content, "--field", "text")
    (tmp_path / "a.jsonl").write_bytes(content)
    direct = answer("eval", model, "--text", tmp_path / "a.jsonl", *SMALL)
    assert data["log_perplexity"] == direct["log_perplexity"]
    assert direct["protocol"]["read_as"] == {"format": "jsonl", "field": "text", "documents": 60, "joined": "token 257"}
    assert direct["protocol"]["sha256"] == sha256_of(tmp_path / "a.jsonl")


def test_evaluate_takes_python_objects(model, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(DOCUMENTS * 20))
    from_file = ppf.evaluate(model, tmp_path / "a.jsonl", sequence_length=32, device="cpu")
    from_list = ppf.evaluate(model, DOCUMENTS * 20, sequence_length=32, device="cpu")
    packed = packing.pack(expected(DOCUMENTS * 20), 32)
    from_ids = ppf.evaluate(model, packed, device="cpu")
    assert from_file["log_perplexity"] == from_list["log_perplexity"] == from_ids["log_perplexity"]
    assert from_list["protocol"]["text"] == "Python list"


def test_fit_and_resume_on_a_dataset(model, tmp_path, one_thread, quick):
    corpus = tmp_path / "corpus.jsonl.gz"
    corpus.write_bytes(gzip.compress(lines(DOCUMENTS * 400, "body")))
    refusal("fit", model, "--text", corpus, "--output", tmp_path / "run", *QUICK, field="text", value=corpus)
    assert not (tmp_path / "run").exists()
    arguments = ["fit", model, "--text", corpus, "--field", "body", "--output", tmp_path / "run", *QUICK]
    answer(*arguments)
    run = ppf.Run(tmp_path / "run")
    assert torch.equal(run.sequences("calibration")[0], expected()[:32])
    documents = run.manifest["read_as"]["text"]["documents"]
    assert documents < 400 and run.manifest["texts"]["text"] == sha256_of(corpus)
    answer(*arguments)  # the same question: returned as it is
    refusal(*arguments, "--text", write_text(tmp_path / "other.txt"), field="output")
    refusal(*arguments, "--field", "id", field="output")
    same = ppf.fit(model, ppf.Text(DOCUMENTS * 400), tmp_path / "run2", settings=run.settings, device="cpu")
    assert torch.equal(same.sequences(), run.sequences())
    assert same.manifest["files"] == {"text": "Python list", "eval_text": None}
    with pytest.raises(InputError, match="another text"):
        ppf.fit(model, ppf.Text(["Another text."] * 999), tmp_path / "run2", settings=run.settings, device="cpu")


@pytest.fixture
def quick(monkeypatch):
    from factories import quick_learning

    quick_learning(monkeypatch)


def test_fit_takes_sequences_of_its_length_only(model, tmp_path):
    settings = ppf.Settings(evaluations=24, sequence_length=32, ffn_multiple=8)
    with pytest.raises(InputError, match="sequences of 16 tokens, not of 32"):
        ppf.fit(model, torch.zeros(20, 16, dtype=torch.int64), tmp_path / "run", settings=settings, device="cpu")
    assert not (tmp_path / "run").exists()
