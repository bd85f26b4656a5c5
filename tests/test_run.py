"""A finished run: answers, evaluators, models, and manifests that are refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import llama, llama_config, rewrite_manifest

import ppf
from ppf.errors import InputError
from ppf.fitting.calibration import calibrate
from ppf.fitting.ranking import rank_layer
from ppf.fitting.run import Run
from ppf.fitting.run.manifest import MANIFEST, read_manifest, write_manifest
from ppf.fitting.session import Session
from ppf.model.policy import Policy
from ppf.storage.sealed import Sealed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tiny_run) -> Run:
    return Run(tiny_run / "run")


@pytest.fixture
def session(run) -> Session:
    return Session(run, "cpu")


@pytest.fixture
def copied(tiny_run, tmp_path) -> Path:
    """A copy of the run, which a test may damage."""
    return Path(shutil.copytree(tiny_run / "run", tmp_path / "run"))


def test_answers_meet_their_ratio(run):
    step = min(run.grid.step_cost) / run.structure.decoder_parameters
    for ratio in (0.05, 0.123, 0.37, 0.5, 0.7, 0.9):
        answer = run.policy(ratio)
        assert abs(answer.delivered_ratio - ratio) <= step / 2 + 1e-6 and answer.requested_ratio == ratio
        assert answer.delivered_ratio == run.grid.ratio(answer.policy)
        prediction = run.predict(answer.policy)
        assert answer.predicted_log_perplexity == float(prediction.mean) and answer.predicted_std == float(
            prediction.std
        )
        assert answer.milliseconds > 0
    assert run.policy(np.float64(0.37)).policy == run.policy(0.37).policy == Run(run.path).policy(0.37).policy


@pytest.mark.parametrize("ratio", [0, 1, -0.2, float("nan"), 0.9999])
def test_impossible_ratios_are_refused(run, ratio):
    with pytest.raises(InputError) as caught:
        run.policy(ratio)
    assert caught.value.field == "ratio"


def test_answers_need_no_weights(tiny_run, copied):
    rewrite_manifest(copied, model=str(copied / "nowhere"))
    run = Run(copied)
    assert run.policy(0.3).policy == Run(tiny_run / "run").policy(0.3).policy
    assert run.ranking and run.predict(run.grid.dense()) and run.sequences().numel()
    with pytest.raises(InputError):
        Session(run, "cpu").materialize(run.grid.dense())


def test_nothing_is_answered_before_completion(copied):
    rewrite_manifest(copied, state="fitting")
    run = Run(copied)
    for call in (lambda: run.policy(0.3), lambda: run.predict(run.grid.dense())):
        with pytest.raises(InputError, match="not finished.*goes on") as caught:
            call()
        assert caught.value.field == "run"


def test_evaluation_repeats_what_the_experience_holds(run, session):
    evaluator = session.evaluator()
    for row in run.experience.rows()[::9]:
        assert evaluator.log_perplexity(row.policy) == pytest.approx(row.log_perplexity, rel=1e-6)
        assert run.grid.ratio(row.policy) == row.ratio
    assert run.experience.rows()[0].policy == run.grid.dense()


def test_evaluators_of_other_texts_and_without_refit(run, session):
    policy = run.policy(0.4).policy
    plain = session.evaluator().log_perplexity(policy)
    assert session.evaluator(refit=False).log_perplexity(policy) != pytest.approx(plain, rel=1e-4)
    other = run.sequences("calibration")[:4]
    assert session.evaluator(sequences=other).tokens == other.numel() != session.evaluator().tokens
    assert session.evaluator(dtype=torch.bfloat16).log_perplexity(policy) == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("refit", [False, True])
def test_materialised_saved_and_loaded_computes_what_was_evaluated(run, session, tmp_path, refit):
    policy = run.policy(0.4).policy
    model = session.materialize(policy, refit=refit)
    ppf.save(model, None, tmp_path / "out", {})
    again, evaluator, ids = ppf.checkpoint.load(tmp_path / "out"), session.evaluator(refit=refit), run.sequences()
    with torch.no_grad():
        logits = again(ids).logits
        assert float(again(ids, labels=ids).loss) == pytest.approx(evaluator.log_perplexity(policy), rel=1e-5)
    expected = evaluator.logits(policy, ids)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert again.config.eos_token_id == session.decoder.config.eos_token_id == 257


def test_results_generate_as_the_dense_model_was_set_to(tiny_run, copied, tmp_path):
    """The dense model's generation settings go along, or none if it has none."""
    model = Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))
    rewrite_manifest(copied, model=str(model))
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"max_new_tokens": 17, "do_sample": True}))
    run = Run(copied)
    found = Session(run, "cpu").materialize(run.policy(0.4).policy).generation_config
    assert found.max_new_tokens == 17 and found.do_sample and found.eos_token_id == 257
    (model / "generation_config.json").unlink()
    assert Session(Run(copied), "cpu").materialize(run.policy(0.4).policy).generation_config.max_new_tokens is None


def test_a_session_takes_weights_that_are_there_already(run, session):
    again = Session(run, "cpu", decoder=session.decoder)
    assert again.decoder is session.decoder
    policy = run.policy(0.4).policy
    assert again.evaluator().log_perplexity(policy) == session.evaluator().log_perplexity(policy)


def test_a_policy_off_the_grid_is_refused(run, session):
    for call in (run.predict, session.materialize, session.evaluator().log_perplexity):
        with pytest.raises(InputError, match="off the grid"):
            call(Policy([3] * 4, [63] * 4))


def test_another_model_in_its_place_is_refused(tiny_run, copied, tmp_path):
    other = Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))
    rewrite_manifest(copied, model=str(other))
    assert Session(Run(copied), "cpu").decoder.structure == Run(copied).structure  # moved, but the same
    llama(llama_config(), seed=1).save_pretrained(other)
    with pytest.raises(InputError, match="is not the model") as caught:
        Session(Run(copied), "cpu").evaluator()
    assert caught.value.field == "model"


def test_moments_and_ranking_are_those_of_the_calibration(run, session):
    for index, statistics in enumerate(calibrate(session.decoder, run.sequences("calibration"))):
        for kind in ("attention", "ffn"):
            kept, whole = run.moments(index).of(kind), statistics.of(kind)
            torch.testing.assert_close(kept.mean, whole.mean)
            torch.testing.assert_close(kept.second_moment, whole.second_moment, rtol=1e-4, atol=1e-6)
            expected = rank_layer(run.settings.ranking, session.decoder, index, statistics)
            assert torch.equal(run.ranking[index].of(kind), expected.of(kind))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("{", "no checksum"),
        ("[]", "no checksum"),
        ("{}", "no checksum"),
        ('{"fingerprint": "0", "state": "complete"}', "older PPF"),
    ],
)
def test_unreadable_manifests_are_refused(copied, content, said):
    (copied / MANIFEST).write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        Run(copied)
    assert caught.value.field == "run" and str(caught.value.value).startswith(str(copied))


@pytest.mark.parametrize(
    "field", ["format", "model", "fingerprint", "structure", "settings", "texts", "files", "state"]
)
def test_manifests_without_a_field_are_refused_by_its_name(copied, field):
    manifest = read_manifest(copied)
    for broken in ({k: v for k, v in manifest.items() if k != field}, manifest | {field: 7}):
        Sealed(copied, "", "", "").write_json(MANIFEST, broken)
        with pytest.raises(InputError, match=f"{MANIFEST}.*{field}"):
            Run(copied)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {"evaluations": 3}}, "evaluations = 3"),
        ({"settings": {"speed": 3}}, "speed = 3"),
        ({"settings": {"early_stop": 1}}, "early-stop = 1"),
        ({"settings": {"ffn_multiple": 7}}, "ffn-multiple = 7"),
        ({"settings": {"ranking": ["wanda-sp"]}}, "ranking = "),
        ({"structure": {"hidden": 0}}, "structure.hidden"),
        ({"structure": {"ffn": [[64, 144, 1, 1]] * 3}}, "number of layers"),
        ({"structure": {"ffn": [[64, 144, 1, 3]] * 4}}, "structure.ffn"),
        # One structure for all layers: the first edition's.
        ({"structure": {"attention": 4}}, "structure.attention"),
        ({"vocabulary": 0}, "vocabulary"),
        ({"seconds": -1.0}, "seconds"),
        ({"state": "done"}, "state"),
    ],
)
def test_impossible_manifests_are_refused_by_field(copied, change, said):
    manifest = read_manifest(copied)
    for name, value in change.items():
        manifest[name] = manifest[name] | value if isinstance(value, dict) else value
    write_manifest(copied, manifest)
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        Run(copied)
    assert caught.value.field == "run" and caught.value.value == copied / MANIFEST


def test_what_is_no_run(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Run(tmp_path / "nowhere")
    with pytest.raises(InputError, match=MANIFEST):
        Run(tmp_path)
