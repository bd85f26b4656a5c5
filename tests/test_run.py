"""A finished run: answers, evaluators, models, and what happens when one of its files is damaged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import llama, llama_config
from safetensors.torch import load_file, save_file

import ppf
from ppf.errors import InputError
from ppf.fitting.calibration import calibrate
from ppf.fitting.ranking import rank_layer
from ppf.fitting.run import Run
from ppf.fitting.run.directory import MANIFEST, layer_file
from ppf.fitting.session import Session
from ppf.model.policy import Policy

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


def rewrite(folder: Path, **changes) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


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
    rewrite(copied, model=str(copied / "nowhere"))
    run = Run(copied)
    assert run.policy(0.3).policy == Run(tiny_run / "run").policy(0.3).policy
    assert run.ranking and run.predict(run.grid.dense()) and run.sequences().numel()
    with pytest.raises(InputError):
        Session(run, "cpu").materialize(run.grid.dense())


def test_nothing_is_answered_before_completion(copied):
    rewrite(copied, state="fitting")
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
    rewrite(copied, model=str(model))
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
    rewrite(copied, model=str(other))
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


# What reads each file.
READERS = {
    "agent.safetensors": lambda run: run.policy(0.3),
    "predictor.safetensors": lambda run: run.predict(run.grid.dense()),
    "texts.safetensors": lambda run: run.sequences(),
    str(layer_file("statistics", 2)): lambda run: run.ranking,
    str(layer_file("library", 3)): lambda run: Session(run, "cpu").evaluator(),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "other tensors"])
def test_damaged_files_are_named(copied, name, damage):
    file = copied / name
    READERS[name](Run(copied))
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "garbage":
        file.write_bytes(b"\xff" * 300)
    else:
        tensors = load_file(file)
        tensors.pop(min(tensors))
        save_file({**tensors, "unknown": torch.zeros(3)}, file)
        if name.startswith("statistics"):  # only the ranking is read from there
            save_file({"ranking.ffn": torch.arange(64)}, file)
        if name.startswith("texts"):
            save_file({"calibration": torch.zeros(2, 3)}, file)
    with pytest.raises(InputError) as caught:
        READERS[name](Run(copied))
    assert caught.value.field == "run" and caught.value.value == file and "fit" in caught.value.remedy


@pytest.mark.parametrize("name", ["agent.safetensors", "predictor.safetensors"])
def test_networks_of_another_structure_are_refused(copied, name):
    tensors = load_file(copied / name)
    save_file(
        {key: torch.cat((value, value)) if value.dim() else value for key, value in tensors.items()}, copied / name
    )
    with pytest.raises(InputError, match="size mismatch"):
        READERS[name](Run(copied))


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", "{}", '{"state": "complete"}', '{"settings": {"evaluations": 1}, "state": "complete"}'],
)
def test_unreadable_manifests_are_refused(copied, content):
    (copied / MANIFEST).write_text(content)
    with pytest.raises(InputError, match=MANIFEST):
        Run(copied)


@pytest.mark.parametrize("field", ["model", "fingerprint", "structure", "settings", "texts", "state"])
def test_manifests_without_a_field_are_refused(copied, field):
    manifest = json.loads((copied / MANIFEST).read_text())
    for broken in ({k: v for k, v in manifest.items() if k != field}, manifest | {field: 7}):
        (copied / MANIFEST).write_text(json.dumps(broken))
        with pytest.raises(InputError, match=MANIFEST):
            Run(copied)


def test_runs_of_the_first_edition_are_refused(copied):
    """Their structure was one for all layers."""
    old = {"layers": 4, "hidden": 48, "kv_groups": 3, "heads_per_group": 2, "head_dim": 8, "channels": 64}
    rewrite(copied, structure=old)
    with pytest.raises(InputError, match=MANIFEST):
        Run(copied)


def test_what_is_no_run(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Run(tmp_path / "nowhere")
    with pytest.raises(InputError, match=MANIFEST):
        Run(tmp_path)


def test_a_corrupt_experience_is_refused(copied):
    (copied / "experience.sqlite").write_bytes(b"\x00garbage" * 1000)
    with pytest.raises(InputError) as caught:
        _ = Run(copied).experience
    assert caught.value.field == "experience"
