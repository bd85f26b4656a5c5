"""``ppf.json`` is believed as it was written, and of the weights it was written with, or not at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from checkpoint_cases import as_an_older_ppf, edit_json
from cli_cases import answer, ppf, refusal
from safetensors.torch import load_file, save_file

import ppf as product
from ppf.checkpoint import load_tokenizer, save
from ppf.checkpoint.report import read_report
from ppf.deliver.standing import report_of
from ppf.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ("--sequence-length", 32, "--device", "cpu")


@pytest.fixture(scope="module")
def result(tiny_run, tmp_path_factory) -> Path:
    """A result; do not change it."""
    output = tmp_path_factory.mktemp("sealed") / "out"
    product.Run(tiny_run / "run").prune(ratio=0.4).save_pretrained(output)
    return output


@pytest.fixture(scope="module")
def sibling(result) -> Path:
    """A result of the same shapes and names, and other weights and figures; do not change it."""
    model, report = product.load(result), json.loads((result / "ppf.json").read_text())
    for weight in model.parameters():
        weight.data.mul_(1.01)
    output = result.parent / "sibling"
    save(model, load_tokenizer(result), output, report | {"measured": report["measured"] | {"perplexity": 1.0}})
    return output


@pytest.fixture
def copy(result, tmp_path) -> Path:
    return Path(shutil.copytree(result, tmp_path / "out"))


def commands(folder: Path, tiny_run: Path) -> list[tuple[object, ...]]:
    """All that go by a result's report, or by its weights."""
    text, out = tiny_run / "text.txt", folder.parent / "made"
    training = ("--tokens", 64, "--batch-tokens", 64, "--method", "norms", "--output", out)
    return [
        ("info", folder),
        ("eval", folder, "--text", text, *SHORT),
        ("recover", folder, "--text", text, *training, *SHORT),
        ("export", folder, "--to", "hf", "--output", out),
        ("generate", folder, "--prompt", "a", "--device", "cpu"),
        ("bench", folder, "--device", "cpu", "--prompt", 4, "--new-tokens", 2, "--prefill", 4),
        ("fit", folder, "--text", text, "--output", out, "--ffn-multiple", 8, *SHORT),
    ]


def test_every_command_refuses_another_results_report(result, sibling, copy, tiny_run):
    assert answer("info", sibling)["report"]["measured"]["perplexity"] == 1.0
    shutil.copy(sibling / "ppf.json", copy)
    for command in commands(copy, tiny_run):
        done = ppf(*command)
        assert done.exit_code == 2 and done.stdout == "" and not (copy.parent / "made").exists()
        assert (
            f"file = {copy / 'ppf.json'}: is of other weights" in done.stderr and "remove its ppf.json" in done.stderr
        )
    shutil.copy(result / "ppf.json", copy)
    shutil.copy(sibling / "model.safetensors", copy)  # the same the other way round
    assert "is of other weights" in refusal("info", copy, field="file", value=copy / "ppf.json")


def test_every_command_refuses_a_changed_figure(copy, tiny_run):
    file = copy / "ppf.json"
    honest = file.read_text()
    digit = r'("perplexity": \d+\.)(\d)'
    file.write_text(re.sub(digit, lambda found: found[1] + str(9 - int(found[2])), honest, count=1))
    assert file.read_text() != honest
    for command in commands(copy, tiny_run):
        done = ppf(*command)
        assert done.exit_code == 2 and done.stdout == "" and not (copy.parent / "made").exists()
        assert f"file = {file}: does not match its checksum" in done.stderr and f"remove {file}" in done.stderr


def test_a_damaged_report_is_refused_by_its_name(copy):
    file = copy / "ppf.json"
    honest = file.read_text()
    for content in (honest[:-9], "", "[]", '"', "NaN", "[" * 99_999, '{"checksum": ' + "[" * 900 + "]" * 900 + "}"):
        file.write_text(content)
        with pytest.raises(InputError, match=f"file = {file}.*remove {file}"):
            read_report(copy)
    for changes in ({"checksum": ...}, {"checksum": "0" * 32}, {"checksum": 5}, {"seed": float("nan")}):
        file.write_text(honest)
        edit_json(file, **changes)
        with pytest.raises(InputError, match=f"file = {file}: does not match its checksum.*remove {file}"):
            read_report(copy)


def test_no_flipped_bit_changes_what_is_said(copy):
    file = copy / "ppf.json"
    honest, said = file.read_bytes(), read_report(copy)
    found = 0
    for position in range(0, len(honest), 11):
        damaged = bytearray(honest)
        damaged[position] ^= 1 << position % 7
        file.write_bytes(damaged)
        try:
            assert read_report(copy) == said  # a space became another one
        except InputError:
            found += 1
    assert found > len(honest) // 11 * 0.5


def test_how_the_json_is_laid_out_does_not_matter(copy):
    said = read_report(copy)
    (copy / "ppf.json").write_text(json.dumps(dict(reversed(said.items())), indent=7), encoding="utf-8-sig")
    assert read_report(copy) == said


def test_one_of_an_older_ppf_is_read_with_a_note_and_only_beside_weights_of_one(result, copy):
    honest, old = answer("info", copy), copy.parent / "old"
    shutil.copytree(copy, old)
    as_an_older_ppf(old)
    with pytest.warns(UserWarning, match="written by an older PPF, without a checksum"):
        facts = answer("info", old)
    assert all(facts[name] == honest[name] for name in ("policy", "parameters", "structure", "saved_again"))
    assert facts["report"]["measured"] == honest["report"]["measured"]
    shutil.copy(old / "ppf.json", copy)
    assert "checksum" in refusal("info", copy, field="file", value=copy / "ppf.json")


def test_an_output_that_is_not_what_was_written_does_not_stand(copy):
    assert report_of(copy)["requested_ratio"] == 0.4
    edit_json(copy / "ppf.json", requested_ratio=0.3)
    assert report_of(copy) is None


def test_a_policy_is_read_from_a_whole_report_or_from_a_file_of_its_own(copy, tiny_run, tmp_path):
    given = ("--output", tmp_path / "made", "--device", "cpu", "--policy")
    policy = json.loads((copy / "ppf.json").read_text())["policy"]
    (tmp_path / "own.json").write_text(json.dumps({"policy": policy}))
    moved = shutil.copy(copy / "ppf.json", tmp_path / "moved.json")
    for file in (copy / "ppf.json", moved, tmp_path / "own.json"):
        assert answer("prune", tiny_run / "run", *given, file, "--force")["policy"] == policy
    policy["widths"]["ffn"][0] -= 8
    edit_json(copy / "ppf.json", policy=policy)
    message = refusal("prune", tiny_run / "run", *given, copy / "ppf.json", field="file", value=copy / "ppf.json")
    assert "checksum" in message and "file of its own" in message


def test_equal_results_are_equal_files_and_other_weights_another_header(result, sibling, tiny_run, tmp_path):
    product.Run(tiny_run / "run").prune(ratio=0.4).save_pretrained(tmp_path / "again")
    for file in result.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    headers = [json.loads((folder / "ppf.json").read_text())["headers"] for folder in (result, sibling)]
    assert headers[0].keys() == headers[1].keys() and headers[0] != headers[1]


def test_other_tools_may_keep_the_mark_of_what_they_changed(copy):
    """A header that is still PPF's does not make other tensors PPF's."""
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    header = file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")]
    save_file(tensors, file)
    data = file.read_bytes()
    file.write_bytes(header + data[8 + int.from_bytes(data[:8], "little") :])
    assert ppf("info", copy).exit_code == 0  # reads no weights
    refusal("generate", copy, "--prompt", "a", "--device", "cpu", field="file", value=file)
