"""ppf compare: everybody on the same run, cells kept, figures that can be checked against the evaluator."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from cli_cases import answer, ppf, refusal
from factories import config_of, llama, quick_learning, tokens, write_checkpoint, write_text

from ppf.errors import InputError
from ppf.families import families, family_of
from ppf.fast.permute import permuted
from ppf.fitting.calibration import calibrate
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.ranking import rank_layer
from ppf.fitting.reader import Reader
from ppf.fitting.run import Run, Settings
from ppf.fitting.session import Session
from ppf.fitting.stages import fit
from ppf.lab.comparison import ALL, compare, parse_methods
from ppf.lab.comparison.asis import _biases, _log_perplexity, _ranking
from ppf.lab.comparison.methods import suited
from ppf.lab.comparison.page import table_of
from ppf.lab.peers import PEERS
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = "wanda-sp as is,flap as is,uniform,uniform-split,flap,evolution:9,static:6,dynamic"


@pytest.fixture(scope="module")
def folder(tiny_run, tmp_path_factory):
    """A run of one's own, and a text that it has not seen."""
    folder = tmp_path_factory.mktemp("compare")
    shutil.copytree(tiny_run / "run", folder / "run")
    write_text(folder / "report.txt", words=300, seed=5)
    return folder


@pytest.fixture(scope="module")
def compared(folder):
    arguments = "--ratios", "0.2,0.5", "--methods", METHODS, "--device", "cpu", "--output", folder / "out"
    return answer("compare", folder / "run", "--text", folder / "report.txt", *arguments)


def cells(data: dict) -> dict:
    return {(cell["method"], cell["requested_ratio"]): cell for cell in data["cells"]}


def test_figures_are_the_evaluators(compared, folder):
    run = Run(folder / "run")
    report = Reader.of(run.model_path, 32).sequences(folder / "report.txt")
    assert compared["protocol"]["tokens"] == report.numel() and compared["protocol"]["sequence_length"] == 32
    evaluator = Session(run, "cpu").evaluator(sequences=report)
    for (name, ratio), cell in cells(compared).items():
        policy = Policy.from_dict(cell["policy"])
        assert abs(cell["delivered_ratio"] - ratio) <= min(run.grid.step_cost) / run.structure.decoder_parameters / 2
        assert cell["perplexity"] == pytest.approx(math.exp(cell["log_perplexity"]))
        if name.endswith("as is"):
            assert not cell["refit"]
        else:
            assert cell["log_perplexity"] == pytest.approx(evaluator.log_perplexity(policy), abs=1e-5)


def test_evaluations_are_counted_and_the_run_stays_as_it_was(compared, tiny_run, folder):
    found = cells(compared)
    assert {found["evolution", r]["evaluations"] for r in (0.2, 0.5)} == {9}
    assert {found["static", r]["evaluations"] for r in (0.2, 0.5)} == {6}
    assert {found[n, 0.2]["evaluations"] for n in ("dynamic", "uniform", "flap", "flap as is")} == {0}
    assert len(Run(folder / "run").experience) == len(Run(tiny_run / "run").experience)


def test_reductions_are_those_of_the_table(compared):
    found = cells(compared)
    entry = compared["reductions"]["PPF dynamic"]["most"]
    names = {cell["label"]: cell["method"] for cell in compared["cells"]}
    peer = found[names[entry["peer"]], entry["ratio"]]["perplexity"]
    assert entry["reduction"] == pytest.approx(1 - found["dynamic", entry["ratio"]]["perplexity"] / peer)
    every = compared["reductions"]["PPF dynamic"]["all"]
    assert len(every) == 2 * 6 and max(e["reduction"] for e in every) == entry["reduction"]


def test_page_and_json_are_written(compared, folder):
    assert json.loads((folder / "out" / "comparison.json").read_text()) == compared
    page = (folder / "out" / "comparison.html").read_text()
    assert page.count("<svg") >= 2 and "<script" not in page
    for cell in compared["cells"]:
        assert cell["label"] in page and f"{cell['perplexity']:.2f}" in page


def test_finished_cells_are_kept_and_others_may_be_added(compared, folder):
    out = folder / "again"
    shutil.copytree(folder / "out", out)
    (out / "cells" / "flap-0-0.2.json").unlink()
    arguments = "--ratios", "0.2,0.3", "--methods", "uniform,flap,owl", "--device", "cpu", "--output", out
    data = answer("compare", folder / "run", "--text", folder / "report.txt", *arguments)
    found = cells(data)
    assert found["uniform", 0.2] == cells(compared)["uniform", 0.2]  # its seconds too: it was not computed again
    assert found["flap", 0.2]["policy"] == cells(compared)["flap", 0.2]["policy"]
    assert {("owl", 0.2), ("owl", 0.3), ("uniform", 0.3)} <= set(found)


def test_damaged_files_are_named(compared, folder):
    """A flipped bit in the question, an emptied cell, and one under another's name."""
    out = folder / "damaged"
    shutil.copytree(folder / "out", out)
    question, cell, other = out / "question.json", *sorted((out / "cells").glob("uniform-0-*.json"))
    at = question.read_bytes().index(b'"seed"') + 8
    flipped = bytearray(question.read_bytes())
    flipped[at] ^= 1
    given = "compare", folder / "run", "--text", folder / "report.txt", "--ratios", "0.2,0.5", "--methods", "uniform"
    for file, damaged in ((question, bytes(flipped)), (cell, b""), (cell, other.read_bytes())):
        content = file.read_bytes()
        file.write_bytes(damaged)
        result = ppf(*given, "--device", "cpu", "--output", out)
        assert result.exit_code == 2 and f"{file}: " in result.stderr, result.stderr
        file.write_bytes(content)


def test_another_question_in_the_same_folder_is_refused(compared, folder, tmp_path):
    write_text(tmp_path / "other.txt", words=200, seed=9)
    given = "compare", folder / "run", "--device", "cpu", "--methods", "uniform"
    refusal(*given, "--text", tmp_path / "other.txt", "--output", folder / "out", field="output")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refusal(*given, "--text", tmp_path / "other.txt", "--output", tmp_path / "full", field="output")


def test_two_ratios_are_two_cells_whatever_their_digits(folder, tmp_path):
    """Ratios that six digits do not tell apart, a method of two numbers of evaluations, and one ratio asked twice."""
    ratios, methods = "0.3,0.30000001,0.3", "uniform,uniform-split:2,uniform-split:3"
    given = "compare", folder / "run", "--text", folder / "report.txt", "--device", "cpu", "--output", tmp_path / "o"
    data = answer(*given, "--ratios", ratios, "--methods", methods)
    assert [(c["label"], c["requested_ratio"]) for c in data["cells"]] == [
        (label, ratio) for label in ("uniform", "uniform-split 2", "uniform-split 3") for ratio in (0.3, 0.30000001)
    ]
    files = {path.name for path in (tmp_path / "o" / "cells").glob("*.json")}
    assert {"uniform-0-0.3.json", "uniform-0-0.30000001.json"} < files and len(files) == 6
    headers, rows = table_of(data)
    assert headers[1:3] == ["30%", "30.000001%"] and len(rows) == 3


def test_a_text_that_policies_were_chosen_on_is_refused(tiny_run, tmp_path):
    given = "compare", tiny_run / "run", "--device", "cpu", "--output", tmp_path / "out"
    refusal(*given, "--text", tiny_run / "text.txt", field="text")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, field",
    [
        (("--ratios", "0.2,x"), "ratios"),
        (("--ratios", "0.2,1.4"), "ratio"),
        (("--methods", "uniform,best"), "methods"),
        (("--methods", "evolution:none"), "methods"),
        (("--methods", "owl:30"), "methods"),
        (("--methods", " , "), "methods"),
        (("--fit-text", "x.txt"), "fit-text"),
    ],
)
def test_what_cannot_be_compared_is_refused(folder, tmp_path, arguments, field):
    given = "compare", folder / "run", "--text", folder / "report.txt", "--device", "cpu", "--output", tmp_path / "o"
    refusal(*given, *arguments, field=field)
    assert not (tmp_path / "o").exists()


def test_a_model_needs_a_text_to_fit_on(tiny_run, folder, tmp_path):
    given = "compare", tiny_run / "model", "--text", folder / "report.txt", "--output", tmp_path / "o"
    refusal(*given, "--device", "cpu", field="fit-text")


def test_all_means_every_peer_and_ppf():
    methods = parse_methods("all")
    assert set(PEERS) <= {m.name for m in methods} and len(methods) == len(ALL)
    assert [m.evaluations for m in methods if m.name == "evolution"] == [1500, 5000]
    assert [m.label for m in methods if m.is_ours] == ["PPF dynamic", "PPF static 150", "PPF static 1,500"]
    assert parse_methods("all,uniform,evolution:1500") == methods
    with pytest.raises(InputError):
        parse_methods("static:0")


def test_flaps_biases_are_the_mean_of_what_was_removed(folder):
    """With the mean of every removed channel given back, a model whose channels are constant loses nothing."""
    run = Run(folder / "run")
    session, moments = Session(run, "cpu"), [run.moments(index) for index in range(run.structure.layers)]
    ranking = _ranking(session.decoder, "flap-wifv", moments)
    decoder = permuted(session.decoder, ranking)
    policy = Policy([3, 2, 3, 3], [64, 64, 32, 64])
    biases = _biases(decoder, ranking, moments, policy)
    gone = ranking[2].ffn[32:]
    expected = session.decoder.ffn(2, 64).down[:, gone] @ moments[2].ffn.mean[gone]
    torch.testing.assert_close(biases[run.structure.layers + 2], expected, rtol=1e-4, atol=1e-6)
    assert not biases[0].any() and biases[1].any()
    report = run.sequences()
    with_bias, without = (_log_perplexity(decoder, run.grid, policy, report, b) for b in (biases, {}))
    assert with_bias != without
    dense = _log_perplexity(decoder, run.grid, run.grid.dense(), report, {})
    assert dense == pytest.approx(session.evaluator().log_perplexity(run.grid.dense()), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_flaps_biases_make_up_for_channels_that_never_change(family):
    """Some channels of layer 1, all of layer 2 and a kv-group of layer 3 are constants: biases alone. With the means
    of these given back, nothing is lost."""
    config = config_of(family, attention_bias=True, mlp_bias=True)
    state = llama(config).state_dict()
    for name, rows in (("1.mlp.gate_proj", 16), ("1.mlp.up_proj", 16), ("2.mlp.gate_proj", 64), ("2.mlp.up_proj", 64),
                       ("3.self_attn.v_proj", 8)):  # fmt: skip
        state[f"model.layers.{name}.weight"][:rows] = 0
    decoder, sequences = Decoder.of_state(config, state), tokens(4, 24)
    grid, moments = Grid(decoder.structure, 8), list(calibrate(decoder, sequences))
    ranking = [rank_layer("flap-wifv", decoder, index, layer) for index, layer in enumerate(moments)]
    ranked, policy = permuted(decoder, ranking), Policy([3, 3, 3, 2], [64, 48, 0, 64])
    biases = _biases(ranked, ranking, moments, policy)
    found, without = (_log_perplexity(ranked, grid, policy, sequences, b) for b in (biases, {}))
    dense = Evaluator(decoder, grid, sequences).log_perplexity(grid.dense())
    assert found == pytest.approx(dense, abs=1e-4) and abs(without - dense) > 1e-3


def test_flaps_biases_are_left_out_where_norms_follow():
    """Of all methods, on every family; a method that was asked for by name is refused instead."""
    every = parse_methods("all")
    for family in families():
        has_norms = any(part.after for part in family.parts.values())
        methods, left_out = suited(every, family)
        assert set(left_out) == ({"flap as is"} if has_norms else set())
        assert len(methods) + len(left_out) == len(every)
    asked = parse_methods("uniform,flap as is")
    assert suited(asked, family_of("qwen3")) == (asked, {})
    with pytest.raises(InputError, match="norms behind"):
        suited(asked, family_of("gemma2"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of a model whose attention goes as a whole and whose sub-layers have norms behind them."""
    folder = tmp_path_factory.mktemp("whole")
    write_checkpoint(folder / "model", family="olmo2")
    write_text(folder / "text.txt")
    write_text(folder / "report.txt", words=300, seed=5)
    settings = Settings(evaluations=24, ffn_multiple=8, sequence_length=32, calibration_tokens=1024)
    with pytest.MonkeyPatch.context() as patch:
        quick_learning(patch)
        fit(folder / "model", folder / "text.txt", folder / "run", settings=settings, device="cpu")
    return folder


def test_all_methods_but_one_run_on_a_family_with_norms_behind_its_sublayers(whole):
    quick = parse_methods("wanda-sp as is,flap as is,uniform,flap,owl,alphapruning,shortgpt,dynamic,static:3")
    everything = [replace(method, by_name=False) for method in quick]
    arguments = whole / "report.txt", whole / "out", everything, [0.3]
    data = compare(Session(Run(whole / "run"), "cpu"), *arguments)
    assert [cell["method"] for cell in data["cells"]] == [m.name for m in quick if m.name != "flap as is"]
    assert list(data["left_out"]) == ["flap as is"]
    headers, rows = table_of(data)
    assert rows[-1] == ["flap as is (left out)", "–", "–", "–"] and len(headers) == 4
    assert "flap as is is left out" in (whole / "out" / "comparison.html").read_text()
    with pytest.raises(InputError, match="flap as is"):
        compare(Session(Run(whole / "run"), "cpu"), whole / "report.txt", whole / "refused", quick, [0.3])
    assert not (whole / "refused").exists()


def test_people_get_a_table(folder):
    out = folder / "out"
    shown = ppf("compare", folder / "run", "--text", folder / "report.txt", "--ratios", "0.2", "--methods", "uniform",
                "--device", "cpu", "--output", out)  # fmt: skip
    assert shown.exit_code == 0 and "uniform" in shown.stdout and "report.txt" in shown.stdout
