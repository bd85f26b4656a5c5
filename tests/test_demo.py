"""The demo, once, as users run it: pruned checkpoints reloaded in new processes, and better than uniform ones."""

import json
import math

import pytest
from cli_cases import answer, ppf

from ppf.checkpoint.hashes import sha256_of
from ppf.cli.demo import DATA

pytestmark = pytest.mark.usefixtures("one_thread")
RATIOS = [0.2, 0.3, 0.5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def result(folder, one_thread):
    return answer("demo", "--output", folder, "--evaluations", 64)


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
