"""Results are written whole or not at all, and known again."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import POLICY, cut, edit_report, flip_bit, refusal, tokens
from factories import TINY
from transformers import AutoModelForCausalLM, GenerationConfig

from ppf import checkpoint
from ppf.checkpoint import check_checkpoint, load, load_decoder, load_tokenizer, save, verify
from ppf.errors import InputError
from ppf.model.build import policy_of
from ppf.model.policy import Policy
from ppf.storage import files

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the bundled model that a test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "source"))


@pytest.fixture
def pruned():
    return cut(POLICY)


def test_saved_result_loads_everywhere_and_verifies(pruned, tmp_path):
    out = tmp_path / "new" / "out"
    save(pruned, load_tokenizer(TINY), out, {"ratio": 0.5})
    report = json.loads((out / "ppf.json").read_text())
    assert report["ratio"] == 0.5
    assert set(report["files"]) == {file.name for file in out.iterdir()} - {"ppf.json"}
    assert verify(out) and not verify(TINY)
    for model in (load(out), AutoModelForCausalLM.from_pretrained(out)):
        assert type(model).__name__ == "PPFLlamaForCausalLM" and policy_of(model.config) == POLICY
        assert torch.equal(model(tokens()).logits, pruned(tokens()).logits)
        assert model.generation_config.eos_token_id == 1
    assert load_tokenizer(out)("abc").input_ids == load_tokenizer(TINY)("abc").input_ids
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    assert {oct(file.stat().st_mode & 0o777) for file in out.iterdir()} == {oct(out.stat().st_mode & 0o666)}


def test_tokenizer_of_a_result_loads_without_ppf(pruned, tmp_path):
    save(pruned, load_tokenizer(TINY), tmp_path / "out", {})
    code = "import sys; from transformers import AutoTokenizer as A; print(len(A.from_pretrained(sys.argv[1])))"
    result = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, cwd="/")
    assert result.stdout.strip() == "2048", result.stderr


@pytest.mark.parametrize("policy", [POLICY, Policy([1] * 8, [64] * 8)], ids=["non-uniform", "uniform"])
def test_results_are_pruned_again(policy, tmp_path):
    save(cut(policy), None, tmp_path / "once", {})
    again = Policy([min(width, 1) for width in policy.attention], [width // 2 for width in policy.ffn])
    save(cut(again, tmp_path / "once"), None, tmp_path / "twice", {})
    model = load(tmp_path / "twice")
    assert policy_of(model.config) == policy_of(check_checkpoint(tmp_path / "twice")) == again
    assert torch.equal(model(tokens()).logits, cut(again)(tokens()).logits)


def test_flipped_weight_bit_in_a_result_is_found(pruned, tmp_path):
    save(pruned, None, tmp_path / "out", {})
    flip_bit(tmp_path / "out" / "model.safetensors", -2)
    for call in (verify, load, load_decoder):
        message = refusal(call, tmp_path / "out")
        assert "model.safetensors" in message and "changed since PPF wrote it" in message and "ppf.json" in message
    (tmp_path / "out" / "model.safetensors").unlink()
    assert "model.safetensors does not exist" in refusal(verify, tmp_path / "out")
    edit_report(tmp_path / "out", headers={})  # as of an export without safetensors
    assert "listed in ppf.json, but does not exist" in refusal(verify, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"x")
    assert "model.safetensors is not listed" in refusal(verify, tmp_path / "out")
    edit_report(tmp_path / "out", files=["x"])
    assert "ppf.json" in refusal(verify, tmp_path / "out")
    edit_report(tmp_path / "out", files=..., headers=...)
    assert not verify(tmp_path / "out")


def test_generation_settings_that_transformers_would_not_write_pass_through(source, tmp_path):
    """Vicuna's: a temperature without do_sample."""
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6}
    (source / "generation_config.json").write_text(json.dumps(settings | {"transformers_version": "4.29.2"}))
    with pytest.raises(ValueError, match="Fix these issues"):
        load(source).generation_config.save_pretrained(tmp_path)
    model = cut(POLICY, source)
    save(model, None, tmp_path / "out", {})
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: value for name, value in written.items() if name != "transformers_version"} == settings
    assert model.generation_config.temperature == load(tmp_path / "out").generation_config.temperature == 0.9
    assert GenerationConfig.from_pretrained(tmp_path / "out").top_p == 0.6


def test_existing_output_is_kept_unless_forced(pruned, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    assert "force" in refusal(save, pruned, None, out, {})
    assert [file.name for file in out.iterdir()] == ["precious"]
    save(pruned, None, out, {}, force=True)
    assert verify(out) and not (out / "precious").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_empty_folder_is_filled_and_a_file_is_refused(pruned, tmp_path):
    (tmp_path / "empty").mkdir()
    save(pruned, None, tmp_path / "empty", {})
    assert verify(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        assert "is a file" in refusal(save, pruned, None, path, {}, force=True)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")]
)
def test_failed_save_leaves_nothing_behind(pruned, tmp_path, monkeypatch, failure, existing):
    out = tmp_path / "new" / "out"
    if existing:
        out.mkdir(parents=True)
        (out / "precious").write_text("x")

    def fail(tensors, file, **_):
        Path(file).write_bytes(b"half")
        raise failure

    monkeypatch.setattr(checkpoint.shards, "save_file", fail)
    expected = InputError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected):
        save(pruned, None, out, {}, force=True)
    left = [str(file.relative_to(tmp_path)) for file in sorted(tmp_path.rglob("*"))]
    assert left == (["new", "new/out", "new/out/precious"] if existing else [])


def test_too_small_disk_is_refused_before_writing(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    message = refusal(save, pruned, None, tmp_path / "out", {})
    assert "no space left" in message and "MB needed" in message
    assert list(tmp_path.iterdir()) == []


def test_full_disk_under_safetensors(pruned, tmp_path):
    """A real file system of 1 MB: safetensors reports a full disk in an error class of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint.writing, "require_space", lambda *_: None)
            assert "no space left" in refusal(save, pruned, None, disk / "out", {})
        assert list(disk.iterdir()) == []
        assert "MB needed" in refusal(save, pruned, None, disk / "out", {})
    finally:
        subprocess.run(["umount", disk], check=True)
