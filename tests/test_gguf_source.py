"""GGUF files as models: what our own exporter writes is read back, with the logits of the model it came from.

Their tokenizers are in test_gguf_tokenizer.py.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_cases import refusal
from cli_cases import answer, ppf
from export_cases import (
    SAMPLE,
    YARN_ROPE,
    bpe_tokenizer,
    gemma_tokenizer,
    sentencepiece_tokenizer,
    uneven,
    write_random,
)
from factories import TINY, quick_learning, tokens, write_text
from gguf import GGUFReader, GGUFWriter

from ppf.checkpoint import gguf, load, load_tokenizer, local_folder, locate
from ppf.deliver.export import open_source, to_gguf
from ppf.errors import InputError
from ppf.fitting.run import Run

pytestmark = [
    pytest.mark.usefixtures("one_thread", "cache"),
    pytest.mark.filterwarnings("ignore:ppf. .* is quantised"),
]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
LARGE = {"vocab_size": 640}  # as many as the tokenizers of these families have
# family, tokenizer, changes of the configuration
CASES = {
    "llama": ("llama", bpe_tokenizer, {}),
    "llama with biases": ("llama", bpe_tokenizer, {"attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", bpe_tokenizer, {"rope_parameters": LLAMA3, "max_position_embeddings": 16384}),
    "llama linear": ("llama", bpe_tokenizer, {"rope_parameters": LOCAL | {"rope_type": "linear", "factor": 2.0}}),
    "tied": ("qwen2", bpe_tokenizer, {"tie_word_embeddings": True}),
    "yarn": ("qwen2", bpe_tokenizer, {"rope_parameters": YARN_ROPE}),
    "qwen3": ("qwen3", bpe_tokenizer, {}),
    "qwen3 wide heads": ("qwen3", bpe_tokenizer, {"head_dim": 16}),
    "gemma2": ("gemma2", gemma_tokenizer, LARGE | {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", gemma_tokenizer, LARGE),
    "gemma3 linear": (
        "gemma3_text", gemma_tokenizer, LARGE
        | {"rope_parameters": {
            "full_attention": LOCAL | {"rope_type": "linear", "factor": 8.0}, "sliding_attention": LOCAL,
        }},
    ),
    "llama of SentencePiece": ("llama", sentencepiece_tokenizer, LARGE),
    "phi3": ("phi3", sentencepiece_tokenizer, LARGE),
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder := tmp_path_factory.mktemp("cache")))
        yield folder / "ppf" / "gguf"


def exported(checkpoint: Path, output: Path, dtype: str = "f32") -> Path:
    return output / to_gguf(open_source(checkpoint), output, dtype, False)["file"]


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load(folder, dtype="float32")(tokens(2, 60)).logits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The bundled model as bf16."""
    return exported(TINY, tmp_path_factory.mktemp("tiny") / "gguf", "bf16")


def rewritten(file: Path, output: Path, change) -> Path:
    """``file`` with its fields and tensors {name: value} changed by ``change(fields, tensors)``."""
    reader = GGUFReader(file)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    values = {name: (field.contents(), field.types[0], field.types[-1]) for name, field in fields.items()}
    arrays = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    change(values, arrays)
    writer = GGUFWriter(output, values["general.architecture"][0])
    for name, (value, kind, inner) in values.items():
        if name != "general.architecture":
            writer.add_key_value(name, value, kind, inner if inner != kind else None)
    for name, (array, kind) in arrays.items():
        writer.add_tensor(name, np.array(array), raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return output


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_back_as_it_was_exported(tmp_path, case):
    family, tokenizer, changes = CASES[case]
    dense = write_random(tmp_path / "dense", None, tokenizer(), family, **changes)
    back = local_folder(exported(dense, tmp_path / "gguf"))
    torch.testing.assert_close(logits(back), logits(dense), atol=2e-5, rtol=1e-5)
    text, (ours, theirs) = SAMPLE.read_text()[:2000] + " äöü 123  x\n\n y", map(load_tokenizer, (back, dense))
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


@pytest.mark.parametrize("dtype, stored", [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_plain_numbers_stay_what_they_are(tmp_path, dtype, stored, recwarn):
    back = load(local_folder(exported(TINY, tmp_path / "gguf", dtype)))
    assert back.dtype == stored and not [w for w in recwarn if "quantised" in str(w.message)]
    for name, weight in load(TINY).state_dict().items():
        assert torch.equal(back.state_dict()[name], weight.to(stored)), name


def test_a_quantised_file_says_so_and_becomes_bfloat16_once(tmp_path, cache, monkeypatch):
    file = exported(TINY, tmp_path / "gguf", "q8_0")
    with pytest.warns(UserWarning, match=r"^ppf: .*quantised \(Q8_0\): quality"):
        found = locate(file)
    assert (
        found.source["file"] == str(file)
        and found.folder.parent == cache
        and load(found.folder).dtype == torch.bfloat16
    )
    error = (logits(found.folder) - logits(TINY)).abs().max()
    assert 1e-3 < error < 0.05 * logits(TINY).abs().max()  # a wrong row order would be off by as much as logits are
    monkeypatch.setattr(gguf, "_write", lambda *arguments: pytest.fail("converted again"))
    copy = shutil.copy(file, tmp_path / "copy.gguf")
    assert local_folder(copy) == found.folder


def test_fit_prune_and_eval_take_a_gguf_file(tmp_path, tiny, monkeypatch):
    quick_learning(monkeypatch)
    text, run, output = write_text(tmp_path / "text.txt"), tmp_path / "run", tmp_path / "out"
    quick = ("--sequence-length", 32, "--device", "cpu")
    tokens = ("--evaluations", 24, "--calibration-tokens", 1024, "--evaluation-tokens", 512)
    facts = answer("fit", tiny, "--text", text, "--output", run, *quick, *tokens)
    assert facts["from"]["kind"] == "gguf" and facts["from"]["file"] == str(tiny)
    report = answer("prune", run, "--ratio", 0.3, "--output", output, "--device", "cpu")
    assert report["model"]["source"] == facts["from"]
    dense = answer("eval", tiny, "--text", text, *quick)
    assert dense["log_perplexity"] == pytest.approx(answer("eval", TINY, "--text", text, *quick)["log_perplexity"])
    assert dense["from"] == facts["from"] and answer("info", tiny)["from"] == facts["from"]
    assert answer("generate", tiny, "--prompt", "The", "--max-new-tokens", 2, "--device", "cpu")["tokens"] == 2
    shutil.rmtree(Run(run).model_path)  # somebody cleans the cache
    Run(run).require_model()
    answer(
        "recover", output, "--text", text, "--teacher", tiny, "--output", tmp_path / "better", "--tokens", 256, *quick
    )


def _without(name):
    return lambda fields, arrays: arrays.pop(name)


def _field(name, value):
    def change(fields, arrays):
        fields[name] = (
            value,
            fields["llama.block_count"][1] if isinstance(value, int) else fields["general.name"][1],
            None,
        )
        fields[name] = (*fields[name][:2], fields[name][1])

    return change


def _first(name, value):
    """The first item of an array."""

    def change(fields, arrays):
        values, *kinds = fields[name]
        fields[name] = ([value, *values[1:]], *kinds)

    return change


def _extra(fields, arrays):
    arrays["blk.0.attn_sinks.weight"] = arrays["blk.0.attn_norm.weight"]


def _narrow(fields, arrays):
    array, kind = arrays["output_norm.weight"]
    arrays["output_norm.weight"] = array[:-32], kind


@pytest.mark.parametrize(
    "change, said",
    [
        (_without("blk.3.ffn_up.weight"), "lacks tensor blk.3.ffn_up.weight"),
        (_without("token_embd.weight"), "lacks tensor token_embd.weight"),
        (_narrow, "tensor output_norm.weight is [96], and the model needs [128]"),
        (_extra, "attn_sinks"),
        (_field("llama.logit_scale", 3), "GGUF llama.logit_scale = 3"),
        (_field("llama.attention.value_length", 16), "attention.value_length = 16"),
        (_field("llama.rope.dimension_count", 16), "rope.dimension_count = 16"),
        (_field("llama.attention.sliding_window", 8), "attention.sliding_window = 8"),
        (_field("llama.attention.head_count_kv", 0), "num_key_value_heads = 0"),
        (_field("llama.block_count", 1 << 30), "GGUF block_count = 1073741824"),
        (_field("llama.embedding_length", 0), "embedding_length = 0"),
        (_field("llama.rope.scaling.type", "longrope"), "longrope"),
        (_field("split.count", 3), "one of 3 parts"),
        (_field("general.architecture", "mamba"), "general.architecture = mamba"),
        (lambda fields, arrays: fields.pop("tokenizer.ggml.tokens"), "tokenizer.ggml.tokens"),
        (_field("tokenizer.ggml.pre", "starcoder"), "GGUF tokenizer.ggml.pre = starcoder"),
        (lambda fields, arrays: fields.pop("tokenizer.ggml.pre"), "GGUF tokenizer.ggml.pre = (none)"),
        (_field("tokenizer.ggml.model", "t5"), "GGUF tokenizer.ggml.model = t5"),
        (_field("tokenizer.ggml.bos_token_id", 1 << 20), "GGUF tokenizer.ggml.bos_token_id = 1048576"),
        (_first("tokenizer.ggml.tokens", "!"), "GGUF tokenizer.ggml.tokens = !"),
        (_first("tokenizer.ggml.merges", "nothing"), "has merges that do not fit its tokens"),
    ],
)
def test_a_file_that_is_not_such_a_model_is_refused(tmp_path, cache, tiny, change, said):
    if said == "longrope":
        scale = _field("llama.rope.scaling.factor", 2)
        change = lambda f, a, first=change: (first(f, a), scale(f, a))  # noqa: E731
    before = sorted(cache.glob("*-?"))
    message = refusal(local_folder, rewritten(tiny, tmp_path / "other.gguf", change))
    assert said in message and "other.gguf" in message
    assert sorted(cache.glob("*-?")) == before


def test_files_that_cannot_be_read_are_refused(tmp_path, tiny, monkeypatch):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny.read_bytes()[:-100_000])
    assert "damaged.gguf: is cut off" in refusal(local_folder, damaged)
    damaged.write_bytes(b"something else")
    assert "does not begin as GGUF files do" in refusal(local_folder, damaged)
    assert "no such file" in ppf("info", tmp_path / "none.gguf").stderr
    monkeypatch.setitem(sys.modules, "gguf", None)
    damaged.write_bytes(tiny.read_bytes() + b" ")
    assert "pip install 'ppf[gguf]'" in refusal(local_folder, damaged)


def test_our_own_layered_files_are_refused_with_what_to_use_instead(tmp_path):
    result = write_random(tmp_path / "pruned", uneven("llama"))
    with pytest.raises(InputError, match="general.architecture = deci"):
        local_folder(exported(result, tmp_path / "gguf"))
