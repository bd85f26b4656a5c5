"""One recovery for all sizes: what is delivered is what was trained, at any policy, and a run like any other."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_cases import answer, ppf, refusal
from factories import tokens
from ranks_cases import forked_together
from safetensors.torch import load_file

import ppf as product
from ppf import InputError, Run, Session, checkpoint
from ppf.deliver.recovery import ElasticSettings, recover_elastic, training
from ppf.deliver.recovery.head import Head, hidden_states
from ppf.deliver.recovery.objective import Objective
from ppf.deliver.recovery.shared import Draws, SharedWeights
from ppf.deliver.results import Choice, deliver
from ppf.fast.permute import identity, permuted
from ppf.fitting.library import Library
from ppf.fitting.materialize import materialize
from ppf.model.decoder import Decoder
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"tokens": 4096, "learning_rate": 3e-3, "sequence_length": 32, "batch_tokens": 256, "distillation": 0.5}
FLAGS = ("--tokens", 4096, "--sequence-length", 32, "--batch-tokens", 256, "--distillation", 0.5, "--device", "cpu")
ABSENT = Policy([3, 2, 0, 1], [64, 0, 8, 32])
METHODS = "full", "lora", "norms"
# What each of torchrun's processes runs: the recovery of the fixture, from what another has begun.
_TOGETHER = """
import json, sys
from ppf import ranks
from ppf.deliver.recovery import ElasticSettings, recover_elastic
from ppf.fitting import retrained
retrained._EFFORT, retrained._OWN = 0.05, 12
ranks.start()
run, text, output, settings = sys.argv[1:]
told = recover_elastic(run, text, output, settings=ElasticSettings("full", **json.loads(settings)), device="cpu")
ranks.stop()
print(json.dumps(told["processes"]))
"""


def elastic(tiny_run: Path, output: Path, method: str = "full", run: str | Path = "run", **changed) -> dict:
    settings = ElasticSettings(method, **(SMALL | changed))
    return recover_elastic(tiny_run / run, tiny_run / "text.txt", output, settings=settings, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """No good predictor is needed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ppf.fitting.retrained._EFFORT", 0.05)
        patch.setattr("ppf.fitting.retrained._OWN", 12)
        yield


@pytest.fixture(scope="module")
def trained() -> list[SharedWeights]:
    """What :func:`recovered` has trained."""
    return []


@pytest.fixture(scope="module")
def recovered(tiny_run, tmp_path_factory, one_thread, quick, trained) -> Path:
    """A run recovered with every weight; do not change it."""
    folder, merged = tmp_path_factory.mktemp("elastic"), SharedWeights.merged
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedWeights, "merged", lambda self: (trained.append(self), merged(self))[1])
        elastic(tiny_run, folder / "run")
    return folder / "run"


def policies(run: Run) -> list[Policy]:
    """The run's own, one with absent sub-layers, the dense one, and one that no step has trained."""
    return [*run.policies([0.1, 0.5]), ABSENT, run.grid.dense(), Policy([1, 1, 3, 0], [8, 40, 0, 64])]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_delivered_is_what_was_trained(recovered, trained, tiny_run):
    """To fp32 precision: the loss of the forward pass in training, and that of the result."""
    session, old = Session(Run(recovered), "cpu"), Session(Run(tiny_run / "run"), "cpu")
    objective, ids, taught = _lesson(tiny_run)
    for policy in policies(session.run):
        with torch.no_grad():
            ours = float(trained[0].loss(policy, objective, ids, taught))
            delivered, before = (
                float(objective(run.materialize(policy), ids, taught)) for run in (session, old)
            )  # fmt: skip
        assert ours == pytest.approx(delivered, rel=1e-5)
        assert abs(before / delivered - 1) > 1e-3  # training has changed it


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_dense_weights(tiny_run, method):
    """What is trained, moved anywhere, becomes dense weights of which the library makes the same models."""
    session = Session(Run(tiny_run / "run"), "cpu")
    shared, run = SharedWeights(session, ElasticSettings(method, **SMALL)), session.run
    with torch.no_grad():
        for parameter in shared.trained.values():
            parameter += 0.05 * torch.randn_like(parameter)
    dense = permuted(Decoder.of_model(shared.merged()), run.ranking)
    library = Library(dense, run.grid, [run.factors(index) for index in range(run.structure.layers)])
    objective, ids, taught = _lesson(tiny_run)
    for policy in policies(run):
        with torch.no_grad():
            ours = float(shared.loss(policy, objective, ids, taught))
            model = materialize(dense, identity(dense), run.grid, policy, library)
            assert ours == pytest.approx(float(objective(model, ids, taught)), rel=1e-5)
            still = session.materialize(policy)
            assert abs(ours / float(objective(still, ids, taught)) - 1) > 1e-4


def _lesson(tiny_run: Path) -> tuple[Objective, torch.Tensor, torch.Tensor]:
    ids, teacher = tokens(2, 24), checkpoint.load(tiny_run / "model")
    return Objective(Head.of(teacher), 0.5), ids, hidden_states(teacher, ids).detach()


def test_gradients_are_those_of_the_cut(tiny_run):
    """Of one output projection, by differences: through what stays, and through what is handed on."""
    session = Session(Run(tiny_run / "run"), "cpu")
    shared = SharedWeights(session, ElasticSettings("full", **SMALL))
    ids, objective = tokens(1, 12), Objective(None, 0.0)
    parameter = shared.trained["model.layers.0.mlp.down_proj.weight"]
    shared.model.double()
    shared._regressions._dtype = torch.float64
    narrow = Policy(ABSENT.attention, [16, *ABSENT.ffn[1:]])
    shared.loss(narrow, objective, ids, None).backward()
    step = 5e-3  # the head computes in fp32
    for column in (3, 40):  # kept, and gone
        row = int(parameter.grad[:, column].abs().argmax())  # where rounding matters least
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter[row, column] += sign * step
                values.append(float(shared.loss(narrow, objective, ids, None)))
                parameter[row, column] -= sign * step
        assert float(parameter.grad[row, column]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=2e-2)
        assert float(parameter.grad[:, column].abs().min()) > 0 and abs(float(parameter.grad[5, column])) > 1e-6


def test_every_size_is_better_on_text_that_was_not_trained_on(recovered):
    told = Run(recovered).manifest["elastic"]
    assert [row["ratio"] for row in told["held_out"]][:5] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert all(row["after"] < 0.9 * row["before"] for row in told["held_out"])
    assert told["loss"]["last"] < told["loss"]["first"]


def test_it_is_a_run_like_any_other(recovered, tiny_run, tmp_path):
    old, new = Run(tiny_run / "run"), Run(recovered)
    assert new.is_complete and new.model_path == recovered / "model"
    rows = new.experience.rows()
    assert len(rows) >= 24 and new.experience.lookup(new.grid.dense()) != old.experience.lookup(old.grid.dense())
    prediction, measured = new.predict(rows[-1].policy), rows[-1].log_perplexity
    assert abs(float(prediction.mean) - measured) < 0.5
    report = answer("prune", recovered, "--ratio", 0.3, "--output", tmp_path / "out", "--device", "cpu")
    assert report["elastic"]["tokens"] == 4096 and report["model"]["path"] == str(recovered / "model")
    assert report["source"]["model"]["path"] == str(tiny_run / "model")
    assert (
        "elastic recovery" in ppf("info", recovered).stdout
        and "elastic recovery" in ppf("info", tmp_path / "out").stdout
    )
    # What comes after is taught by the dense model at the beginning.
    again = answer(
        "recover", tmp_path / "out", "--text", tiny_run / "text.txt", "--method", "norms", "--output",
        tmp_path / "more", *FLAGS,
    )  # fmt: skip
    assert again["recovery"]["teacher"] == str(tiny_run / "model")


def test_the_elastic_model_has_the_results_of_all_sizes(recovered):
    session, ids = Session(Run(recovered), "cpu"), tokens(2, 24)
    model = product.load(recovered, "cpu", elastic=True)
    for policy in policies(session.run):
        with torch.no_grad(), model.at(policy):
            torch.testing.assert_close(model(ids).logits, session.materialize(policy)(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_interrupted_training_ends_as_an_uninterrupted_one(recovered, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "_SAVE_SHARE", math.inf)
    advance = training.Training._advance

    def interrupted(self):
        advance(self)
        if self.step == 6:
            raise KeyboardInterrupt  # after the step, before it is saved

    monkeypatch.setattr(training.Training, "_advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        elastic(tiny_run, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(training.Training, "_advance", advance)
    told = elastic(tiny_run, tmp_path / "run")
    ours, theirs = weights(recovered), weights(tmp_path / "run")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and set(ours) == set(theirs)
    assert told["loss"] == Run(recovered).manifest["elastic"]["loss"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    with pytest.warns(UserWarning, match="holds exactly this already"):
        assert elastic(tiny_run, tmp_path / "run") == told


def test_two_processes_go_on_with_what_one_began(recovered, tiny_run, tmp_path, monkeypatch):
    save = training.Training._save

    def stop(self):
        save(self)
        if self.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "_SAVE_SHARE", math.inf)
    monkeypatch.setattr(training.Training, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        elastic(tiny_run, tmp_path / "run")
    arguments = tiny_run / "run", tiny_run / "text.txt", tmp_path / "run", json.dumps(SMALL)
    ended = forked_together(2, _TOGETHER, *arguments)
    assert [json.loads(done.stdout.splitlines()[-1]) for done in ended] == [2, 2]
    alone, together = weights(recovered), weights(tmp_path / "run")
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-3, atol=1e-4)
    ours, theirs = (Run(folder).manifest["elastic"]["loss"] for folder in (recovered, tmp_path / "run"))
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_steps_draw_the_ends_and_something_between(tiny_run):
    run = Run(tiny_run / "run")
    draws = Draws(run, ElasticSettings(**SMALL, policies=4))
    steps = [draws.at(step) for step in range(40)]
    assert all(step[:2] == [draws.policies[0], draws.policies[-1]] and len(step) == 4 for step in steps)
    assert steps == [draws.at(step) for step in range(40)] and len({step[2] for step in steps}) > 8
    assert [run.grid.ratio(draws.policies[at]) for at in (0, -1)] == pytest.approx([0.1, 0.5], abs=0.02)


def test_what_cannot_be_trained_is_refused(tiny_run, recovered, tmp_path):
    text, run, out = tiny_run / "text.txt", tiny_run / "run", tmp_path / "out"
    deliver(Session(Run(run), "cpu"), Choice(ABSENT, "given"), tmp_path / "pruned")

    def refused(field: str, problem: str, *arguments: object) -> None:
        assert problem in refusal("recover", *arguments, "--text", text, "--output", out, *FLAGS, field=field)

    refused("run", "is a checkpoint of one size", tmp_path / "pruned", "--elastic")
    refused("model", "--elastic", run)
    refused("largest-ratio", "for one size", tmp_path / "pruned", "--largest-ratio", 0.4)
    refused("smallest-ratio", "leaves no sizes", run, "--elastic", "--smallest-ratio", 0.6)
    refused("largest-ratio", "more than this model can lose", run, "--elastic", "--largest-ratio", 0.999)
    refused("policies", "at least", run, "--elastic", "--policies", 1)
    with pytest.raises(InputError, match="holds the run"):
        elastic(tiny_run, run)
    with pytest.raises(InputError, match="exists and is not empty"):
        elastic(tiny_run, recovered, seed=1)
    assert not out.exists() and not Path(f"{out}.unfinished").exists()


def test_a_run_whose_model_has_changed_is_refused(recovered, tiny_run, tmp_path):
    shutil.copytree(recovered, tmp_path / "run")
    file = tmp_path / "run" / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="does not match its checksum"):
        elastic(tiny_run, tmp_path / "out", run=tmp_path / "run")
    assert not (tmp_path / "out").exists()


def test_trained_again_it_learns_from_the_same_teacher(recovered, tiny_run, tmp_path):
    told = elastic(tiny_run, tmp_path / "run", run=recovered, method="norms", tokens=256)
    assert told["teacher"] == str(tiny_run / "model") and told["from"] == str(recovered)
