"""Commands on models whose layers stream say and write what they do on resident ones."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from cli_cases import answer, fit_arguments, refusal, rows
from factories import quick_learning, write_text
from test_budget import uneven_profile

from ppf import checkpoint
from ppf.checkpoint import load_decoder
from ppf.checkpoint.report import OWN
from ppf.choose.budget import MemoryBudget, RatioBudget
from ppf.choose.budget.timed import LatencyBudget
from ppf.cli.options import placement
from ppf.deliver.results import Choice, choose, deliver
from ppf.errors import InputError
from ppf.families import family_of
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.perplexity import evaluate
from ppf.fitting.run import Run, Settings
from ppf.fitting.run.directory import layer_file
from ppf.fitting.selection import Selection
from ppf.fitting.session import Session
from ppf.fitting.stages import fit
from ppf.lab.comparison import compare, parse_methods
from ppf.lab.comparison.methods import suited
from ppf.lab.peers import PEERS, PeerStatistics
from ppf.model.stream import Placement

pytestmark = pytest.mark.usefixtures("one_thread")
PLACES = pytest.mark.parametrize("place", ["host", "disk"])


def on(place: str, tiny_run: Path) -> Session:
    return Session(Run(tiny_run / "run"), "cpu", placement=Placement(place))


@pytest.fixture(scope="module")
def resident(tiny_run, tmp_path_factory) -> Path:
    """A result of resident weights; do not change it."""
    session, out = on("gpu", tiny_run), tmp_path_factory.mktemp("resident") / "out"
    deliver(session, choose(session, 0.4), out)
    return out


@PLACES
def test_results_are_the_same_files(tiny_run, resident, place, tmp_path):
    session = on(place, tiny_run)
    report = deliver(session, choose(session, 0.4), tmp_path / "out")
    assert not session.permuted.resident
    ours, theirs = (json.loads((folder / "ppf.json").read_text()) for folder in (tmp_path / "out", resident))
    assert ours["files"] == theirs["files"] and ours["parameters"] == theirs["parameters"]
    assert ours["budget"] == theirs["budget"] and ours["measured"]["protocol"] == theirs["measured"]["protocol"]
    assert ours == report | {name: ours[name] for name in OWN}
    # By the layers one by one, not by transformers' model.
    assert ours["measured"]["log_perplexity"] == pytest.approx(theirs["measured"]["log_perplexity"], rel=1e-5)
    dense = load_decoder(tiny_run / "model").state().values()
    assert ours["parameters"]["dense"] == sum(tensor.numel() for tensor in dense)


def test_counted_budgets_are_counted_alike_and_timed_ones_refused(tiny_run, tmp_path):
    sessions, run = {place: on(place, tiny_run) for place in ("disk", "gpu")}, Run(tiny_run / "run")
    for budget in (RatioBudget(run.grid, 0.3), MemoryBudget.of(run, 3e-4, 0)):
        choice = Choice(run.policy(0.3).policy, "agent", budget)
        found = [deliver(s, choice, tmp_path / f"{budget.name} {at}") for at, s in sessions.items()]
        assert found[0]["budget"] == found[1]["budget"] and found[0]["budget"]["delivered"] > 0
    profile = uneven_profile(run.grid)
    least, most = profile.costs(run.grid).range(run.grid)
    timed = Choice(run.policy(0.3).policy, "agent", LatencyBudget(run.grid, (least + most) / 2, profile))
    with pytest.raises(InputError, match="latency-ms"):
        deliver(sessions["disk"], timed, tmp_path / "timed")
    assert not (tmp_path / "timed").exists()
    assert deliver(sessions["gpu"], timed, tmp_path / "timed")["budget"]["delivered"] > 0


@PLACES
def test_models_and_selections_are_scored_alike(tiny_run, resident, place):
    model, sequences = tiny_run / "model", Run(tiny_run / "run").sequences()
    everything = Selection(((0, 2), (1,), (), (0, 1, 2)), ((*range(40),), (), (3, 5), (*range(64),)))
    for folder, selection in ((model, None), (resident, None), (model, everything)):
        streamed, plain = (
            evaluate(folder, sequences, selection, device="cpu", placement=Placement(p)) for p in (place, "gpu")
        )
        assert streamed["log_perplexity"] == pytest.approx(plain["log_perplexity"], rel=1e-5)
        assert streamed | {"log_perplexity": 0, "perplexity": 0, "seconds": 0, "model": ""} == plain | {
            "log_perplexity": 0, "perplexity": 0, "seconds": 0, "model": ""
        }  # fmt: skip
    half = evaluate(model, sequences, dtype="bfloat16", device="cpu", placement=Placement(place))
    assert half["dtype"] == "bfloat16" and half["log_perplexity"] == pytest.approx(plain["log_perplexity"], rel=0.5)


def test_commands_take_the_options(tiny_run, resident, tmp_path, monkeypatch):
    quick_learning(monkeypatch)
    fitted = answer(*fit_arguments(tiny_run / "model", tiny_run / "text.txt", tmp_path / "run"), "--weights", "disk")
    assert fitted["state"] == "complete" and rows(tmp_path / "run") == rows(tiny_run / "run")
    for layer in range(4):
        ours, theirs = (folder / layer_file("library", layer) for folder in (tmp_path / "run", tiny_run / "run"))
        assert ours.read_bytes() == theirs.read_bytes()
    out = tmp_path / "out"
    options = "--weights", "disk", "--gpu-memory-gb", 4
    pruned = answer("prune", tiny_run / "run", "--ratio", 0.4, "--output", out, *options)
    assert pruned["measured"] == json.loads((out / "ppf.json").read_text())["measured"]
    assert (out / "model.safetensors").read_bytes() == (resident / "model.safetensors").read_bytes()
    text = tmp_path / "other.txt"
    write_text(text, words=300, seed=5)
    arguments = ("eval", out, "--text", text, "--sequence-length", 32, "--device", "cpu")
    streamed, plain = answer(*arguments, "--weights", "host"), answer(*arguments)
    assert streamed["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)
    assert "moon" in refusal(*arguments, "--weights", "moon", field="weights", value="moon")
    for wrong in ("nan", "inf", 0.5, -3):
        refusal(*arguments, "--gpu-memory-gb", wrong, field="gpu-memory-gb", value=wrong)


def test_gigabytes_are_decimal():
    assert placement("auto", None) == Placement() and placement("host", 12.5) == Placement("host", 12_500_000_000)


@pytest.mark.parametrize("ranking", ["taylor", "loraprune"])
def test_rankings_by_gradients_need_all_weights(tiny_run, tmp_path, ranking):
    arguments = fit_arguments(tiny_run / "model", tiny_run / "text.txt", tmp_path / "run")
    message = refusal(*arguments, "--ranking", ranking, "--weights", "disk", field="weights", value="host or disk")
    assert f"--ranking {ranking}" in message and not (tmp_path / "run").exists()


def test_a_fits_weights_are_read_once_and_exist_once(tiny_run, tmp_path, monkeypatch):
    quick_learning(monkeypatch)
    loaded, alive, load, measure = [], [], checkpoint.load_decoder, Evaluator.log_perplexities

    def loading(*arguments, **options):
        loaded.append(weakref.ref(decoder := load(*arguments, **options)))
        return decoder

    def measuring(*arguments):
        alive.append(sum(decoder() is not None for decoder in loaded))
        return measure(*arguments)

    monkeypatch.setattr(checkpoint, "load_decoder", loading)
    monkeypatch.setattr(Evaluator, "log_perplexities", measuring)
    settings = Settings(evaluations=24, ffn_multiple=8, sequence_length=32, calibration_tokens=1024)
    fit(tiny_run / "model", tiny_run / "text.txt", tmp_path / "run", settings=settings, device="cpu")
    assert len(loaded) == 1 and alive and not any(alive)  # in ranking order only


METHODS = "wanda-sp as is,flap as is,global-mp,flap,owl,alphapruning,atp:3,cfsp,adapt-pruner,shortgpt"


def test_comparisons_of_layers_that_stream(tiny_run, tmp_path):
    write_text(tmp_path / "report.txt", words=300, seed=5)
    found = []
    for place in ("gpu", "disk"):
        session = on(place, tiny_run)
        data = compare(session, tmp_path / "report.txt", tmp_path / place, parse_methods(METHODS), [0.3])
        found.append([(c["method"], c["policy"], c["log_perplexity"]) for c in data["cells"]])
        assert "decoder" not in vars(session) or place == "disk"  # resident weights exist once
    assert found[0] == found[1] and len(found[0]) == len(METHODS.split(","))


def test_every_look_at_a_layer_is_in_order(tiny_run, monkeypatch):
    """One that went back and forth would copy a layer each time."""
    session = on("disk", tiny_run)
    statistics = PeerStatistics.of_run(session.run, session.evaluator(), 0)
    statistics.activations  # noqa: B018  (made once, for all)
    stream, fetched = session.permuted.layers, []
    take = stream._take
    monkeypatch.setattr(stream, "_take", lambda index: fetched.append(index) or take(index))
    for name in ("global-mp", "flap", "owl", "alphapruning", "cfsp"):
        fetched.clear()
        PEERS[name].allocate(session.run.structure, statistics, RatioBudget(session.run.grid, 0.3))
        assert fetched == sorted(fetched), name


def test_methods_by_gradients_need_all_weights(tiny_run, tmp_path):
    every, llama = parse_methods("all"), family_of("llama")
    assert set(suited(every, llama, resident=False)[1]) == {"tracenas"} and not suited(every, llama)[1]
    write_text(tmp_path / "report.txt", words=300, seed=5)
    with pytest.raises(InputError, match="tracenas"):
        compare(on("disk", tiny_run), tmp_path / "report.txt", tmp_path / "out", parse_methods("tracenas"), [0.3])
    assert not (tmp_path / "out").exists()
    session = on("disk", tiny_run)
    statistics = PeerStatistics.of_run(session.run, session.evaluator(), 0)
    with pytest.raises(InputError, match="TraceNAS"):
        PEERS["tracenas"].allocate(session.run.structure, statistics, RatioBudget(session.run.grid, 0.3))


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["host", "disk"])
def test_results_on_a_gpu_are_the_same_files(tiny_run, place, tmp_path):
    reports = []
    for at in ("gpu", place):
        session = Session(Run(tiny_run / "run"), "cuda", placement=Placement(at))
        deliver(session, choose(session, 0.4), tmp_path / at)
        reports.append(json.loads((tmp_path / at / "ppf.json").read_text()))
    assert reports[0]["files"] == reports[1]["files"]
    values = [report["measured"]["log_perplexity"] for report in reports]
    assert values[0] == pytest.approx(values[1], rel=1e-4) and torch.cuda.is_available()
