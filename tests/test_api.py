"""Python as callers write it: fit by keyword, prune and save, evaluate, what is logged, and devices."""

import inspect
import json
import logging
import math
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from factories import quick_learning
from ranks_cases import forked_together
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppf
from ppf import checkpoint
from ppf.checkpoint.report import OWN
from ppf.deliver.results import choose_for
from ppf.progress import logged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tiny_run) -> ppf.Run:
    return ppf.Run(tiny_run / "run")


@pytest.fixture
def copied(tiny_run, tmp_path) -> ppf.Run:
    """A run that a search may add to."""
    return ppf.Run(shutil.copytree(tiny_run / "run", tmp_path / "run"))


@pytest.fixture
def records(caplog) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="ppf")
    return caplog


def messages(records) -> list[str]:
    return [record.getMessage() for record in records.records if record.name == "ppf"]


def report_of(folder) -> dict:
    return json.loads((folder / "ppf.json").read_text())


def refused(field: str, work) -> str:
    with pytest.raises(ppf.InputError) as caught:
        work()
    assert caught.value.field == field and caught.value.remedy
    return str(caught.value)


def test_a_fit_takes_settings_by_name_and_says_where_it_is(tiny_run, tmp_path, monkeypatch, records):
    quick_learning(monkeypatch)
    seen = []
    run = ppf.fit(
        tiny_run / "model", tiny_run / "text.txt", tmp_path / "run", evaluations=24, ffn_multiple=8,
        sequence_length=32, calibration_tokens=1024, device="cpu", progress=lambda *now: seen.append(now),
    )  # fmt: skip
    assert type(run) is ppf.Run and run.is_complete and run.settings.evaluations == 24
    assert run.settings == ppf.Settings(24, ffn_multiple=8, sequence_length=32, calibration_tokens=1024)
    stages = list(dict.fromkeys(stage for stage, *_ in seen))
    assert stages == ["calibrate", "evaluate", "learn"]
    said = messages(records)
    for stage in stages:
        assert len([line for line in said if line.startswith(f"{stage}: ") and " s" in line]) == 1, said
        assert len([line for line in said if line.startswith(f"{stage}: ") and " of " in line]) == 1, said
    assert said[-1] == f"{run.path}: complete"


def test_settings_are_given_in_one_way_only(tiny_run, tmp_path):
    def fit(**named):
        return ppf.fit(tiny_run / "model", tiny_run / "text.txt", tmp_path / "run", device="cpu", **named)

    assert "settings=" in refused("evaluations", lambda: fit(settings=ppf.Settings(), evaluations=30))
    assert "evaluations" in refused("evalutions", lambda: fit(evalutions=30))
    refused("ffn-multiple", lambda: fit(ffn_multiple=0))
    assert not (tmp_path / "run").exists()


def test_what_is_pruned_is_saved_with_all_that_belongs_to_it(run, tmp_path, records):
    small = run.prune(ratio=0.4, device="cpu")
    report = small.save_pretrained(tmp_path / "out")
    answer = run.policy(0.4)
    assert (small.policy, small.policy_from) == (answer.policy, answer.source)
    assert report["policy"] == small.policy.to_dict() and report["delivered_ratio"] == small.ratio
    written = report_of(tmp_path / "out")
    assert {name: value for name, value in written.items() if name not in OWN} == json.loads(json.dumps(report))
    assert "tokenizer.json" in report_of(tmp_path / "out")["files"]
    model, tokenizer = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModelForCausalLM, AutoTokenizer))
    mine, ids = small.materialize(), run.sequences()[:2]
    assert torch.equal(model.eval()(ids).logits, mine(ids).logits)
    assert tokenizer("The city").input_ids == small.tokenizer("The city").input_ids
    assert model.generation_config.to_diff_dict() == mine.generation_config.to_diff_dict()
    assert str(round(report["measured"]["perplexity"], 2)) in messages(records)[-1]
    with pytest.warns(UserWarning, match="out holds exactly this already: nothing was written"):
        assert small.save_pretrained(tmp_path / "out")["measured"] == report["measured"]
    refused("output", lambda: run.prune(ratio=0.3, device="cpu").save_pretrained(tmp_path / "out"))
    assert small.save_pretrained(tmp_path / "out", force=True)["measured"] == report["measured"]


def test_results_are_judged_by_tasks_when_asked(run, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'ppf[eval]'")
    items = [{"query": "The city of", "choices": [" the", " London"], "gold": gold} for gold in (0, 1)]
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "quiz.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    tasks = ppf.Tasks.open("quiz", tmp_path / "items")
    report = run.prune(0.4, device="cpu").save_pretrained(tmp_path / "out", tasks=tasks)
    assert report_of(tmp_path / "out")["tasks"] == report["tasks"]
    assert report["tasks"]["quiz"]["figures"]["acc"]["value"] == 0.5  # one of two opposite answers is right


def test_the_command_writes_the_same(run, tiny_run, tmp_path):
    from cli_cases import ppf as command

    result = command("prune", tiny_run / "run", "--ratio", "0.4", "--output", tmp_path / "theirs", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    run.prune(0.4, device="cpu").save_pretrained(tmp_path / "ours")
    assert report_of(tmp_path / "ours") == report_of(tmp_path / "theirs")  # with the hashes of all files


def test_models_made_are_the_callers_own(run, tmp_path):
    small = run.prune(ratio=0.4, device="cpu")
    mine = small.materialize()
    with torch.no_grad():
        mine.lm_head.weight.zero_()
    small.save_pretrained(tmp_path / "out")
    assert checkpoint.load(tmp_path / "out").lm_head.weight.abs().max() > 0
    assert small.materialize().lm_head.weight.abs().max() > 0


def test_a_search_beats_or_equals_the_answer_and_its_evaluations_stay(copied, tmp_path):
    before, answer = len(copied.experience), copied.policy(0.4)
    small = copied.prune(ratio=0.4, search=12, device="cpu")
    found, its = copied.evaluate([small.policy, answer.policy], device="cpu")
    assert found["log_perplexity"] <= its["log_perplexity"] + 1e-6
    assert len(copied.experience) > before and small.policy_from == "search"
    assert small.save_pretrained(tmp_path / "out")["search_evaluations"] == 12


@pytest.mark.parametrize("name", ["weights_gb", "memory_gb"])
def test_sizes_in_bytes_are_met(run, tmp_path, name):
    limit = 0.8 * sum(tensor.nbytes for tensor in run.session("cpu").decoder.state().values()) / 1e9
    small = run.prune(**{name: limit}, device="cpu")
    assert run.policy(**{name: limit}).policy == small.policy
    report = small.save_pretrained(tmp_path / "out")
    assert 0.9 * limit < report["budget"]["delivered"] <= limit
    sizes = [tensor.nbytes for tensor in small.materialize().state_dict().values()]
    assert sum(sizes) / 1e9 == pytest.approx(report["budget"]["delivered"])


def test_a_policy_of_ones_own_comes_in_any_form(run, tmp_path):
    policy = run.policy(0.3).policy
    (tmp_path / "policy.json").write_text(json.dumps(policy.to_dict()))
    for form in (policy, policy.to_dict(), tmp_path / "policy.json", str(tmp_path / "policy.json")):
        small = run.prune(policy=form, device="cpu")
        assert small.policy == policy and small.policy_from == "given"


def test_what_does_not_go_together_is_one_line(run, tmp_path):
    policy = run.policy(0.3).policy
    refused("ratio", run.prune)
    refused("ratio", lambda: run.prune(1.5))
    refused("budget", lambda: run.prune(0.3, weights_gb=1))
    refused("weights_gb", lambda: run.prune(weights_gb=1, memory_gb=1))
    refused("ratio", lambda: run.prune(0.3, policy=policy))
    refused("search", lambda: run.prune(0.3, search=0))
    refused("policy", lambda: run.prune(policy=tmp_path / "none.json"))
    refused("device", lambda: run.prune(0.3, device="tpu"))
    short = ppf.Policy(policy.attention[:-1], policy.ffn[:-1])
    for work in (lambda: run.prune(policy=short), lambda: run.evaluate(short)):
        with pytest.raises(ppf.InputError):
            work()


def test_policies_are_evaluated_truly(run, tmp_path):
    policies = [run.policy(ratio).policy for ratio in (0.2, 0.4)]
    one, both = run.evaluate(policies[0], device="cpu"), run.evaluate(policies, device="cpu")
    assert both == [one, run.evaluate(policies[1], device="cpu")] and both[1] != one
    assert one["perplexity"] == math.exp(one["log_perplexity"]) and one["ratio"] == run.grid.ratio(policies[0])
    report = run.prune(policy=policies[1], device="cpu").save_pretrained(tmp_path / "out")
    assert report["measured"]["log_perplexity"] == pytest.approx(both[1]["log_perplexity"], abs=1e-4)
    assert run.evaluate([], device="cpu") == []


def test_policies_are_evaluated_on_other_texts(run, tiny_run, tmp_path):
    policy = run.policy(0.4).policy
    text = tmp_path / "other.txt"
    text.write_text((tiny_run / "text.txt").read_text()[:4000])
    run.prune(policy=policy, device="cpu").save_pretrained(tmp_path / "out")
    measured = ppf.evaluate(tmp_path / "out", text, sequence_length=32, device="cpu")
    found = run.evaluate(policy, text, device="cpu")
    assert found["log_perplexity"] == pytest.approx(measured["log_perplexity"], abs=1e-4)
    assert run.evaluate(policy, [text.read_text()], device="cpu") == found
    own = run.evaluate(policy, run.sequences(), device="cpu")
    assert own == run.evaluate(policy, device="cpu") != found
    without = run.evaluate(policy, refit=False, device="cpu")
    model = run.session("cpu").materialize(policy, refit=False)
    plain = ppf.evaluate(model, run.sequences())
    assert without["log_perplexity"] == pytest.approx(plain["log_perplexity"], abs=1e-4) and without != own
    refused("text", lambda: run.evaluate(policy, torch.zeros(3), device="cpu"))
    refused("text", lambda: run.evaluate(policy, tmp_path / "none.txt", device="cpu"))


def test_a_model_in_memory_is_evaluated_like_its_folder(run, tiny_run, tmp_path):
    """On a text in every form that a fit takes."""
    model, tokenizer = checkpoint.load(tiny_run / "model", "cpu"), checkpoint.load_tokenizer(tiny_run / "model")
    prose = (tiny_run / "text.txt").read_text()[:4000]
    (tmp_path / "a.txt").write_text(prose)
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": prose}) + "\n")
    ids = torch.tensor(tokenizer(prose, add_special_tokens=False)["input_ids"])
    sequences = ids[: len(ids) // 32 * 32].view(-1, 32)
    forms = {
        "path": tmp_path / "a.txt",
        "dataset": ppf.Text(tmp_path / "a.jsonl", field="body"),
        "strings": [prose],
        "ids": ids,
        "ids of documents": [ids[:100].tolist(), ids[100:].tolist()],
        "sequences": sequences,
        "short integers": sequences.int(),
    }
    found = {}
    for name, text in forms.items():
        there, mine = (
            ppf.evaluate(given, text, sequence_length=32, **more)
            for given, more in ((tiny_run / "model", {"device": "cpu"}), (model, {"tokenizer": tokenizer}))
        )
        assert mine["log_perplexity"] == there["log_perplexity"] and mine["protocol"] == there["protocol"], name
        found[name] = mine
    assert len({round(of["log_perplexity"], 4) for of in found.values()}) == 1
    assert found["sequences"]["protocol"] == found["short integers"]["protocol"]
    assert found["sequences"]["protocol"]["text"] == "Python Tensor" and found["path"]["from"] == {"kind": "memory"}
    assert ppf.evaluate(model, sequences)["log_perplexity"] == found["sequences"]["log_perplexity"]
    policy = run.grid.dense()
    assert run.evaluate(policy, ids, device="cpu") == run.evaluate(policy, sequences.int(), device="cpu")


def test_what_a_model_in_memory_cannot_be_asked(tiny_run):
    folder, model = tiny_run / "model", checkpoint.load(tiny_run / "model", "cpu")
    refused("tokenizer", lambda: ppf.evaluate(model, tiny_run / "text.txt"))
    refused("tokenizer", lambda: ppf.evaluate(model, ["Some words."]))
    tokenizer = checkpoint.load_tokenizer(folder)
    refused("tokenizer", lambda: ppf.evaluate(folder, tiny_run / "text.txt", tokenizer=tokenizer, device="cpu"))
    beyond = refused("text", lambda: ppf.evaluate(model, torch.full((2, 8), model.config.vocab_size)))
    assert f"token {model.config.vocab_size}" in beyond and "vocabulary" in beyond


def test_evaluating_leaves_a_model_in_training_as_it_was(run):
    model = run.session("cpu").materialize(run.grid.dense())
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids, before = run.sequences()[:2], ppf.evaluate(model, run.sequences()[:2])["log_perplexity"]
    model.train()
    model.model.norm.eval()
    assert ppf.evaluate(model, ids)["log_perplexity"] == before
    assert model.training and model.model.layers[0].training and not model.model.norm.training


def test_weights_are_read_once_and_let_go(run):
    first = run.session("cpu")
    assert run.session("cpu") is first and run.session(torch.device("cpu"), ppf.Placement()) is first
    other = run.session("cpu", ppf.Placement("disk"))
    assert other is not first and other is run.session("cpu", ppf.Placement("disk"))
    run.release()
    assert run.session("cpu", ppf.Placement("disk")) is not other


@pytest.mark.parametrize("size", [{"ratio": 0.3}, {"memory_gb": 0.0001}])
def test_choices_travel_between_processes(run, size):
    """Under torchrun the first process's search is what all of them return."""
    from ppf.deliver.request import Request

    session = run.session("cpu")
    limit = 0.8 * sum(tensor.nbytes for tensor in session.decoder.state().values()) / 1e9
    size = {name: limit if name == "memory_gb" else value for name, value in size.items()}
    choice = choose_for(session, Request(**size).budget(run))
    again = pickle.loads(pickle.dumps(choice))
    assert again.policy == choice.policy and again.budget.cost(again.policy) == choice.budget.cost(choice.policy)


def test_every_device_is_auto_unless_said():
    things = {name: getattr(ppf, name) for name in ppf.__all__} | dict(inspect.getmembers(ppf.Run))
    asked = {
        name: inspect.signature(thing).parameters
        for name, thing in things.items()
        if inspect.isfunction(thing) or (inspect.isclass(thing) and thing.__module__.startswith("ppf.fitting"))
    }
    defaults = {name: given["device"].default for name, given in asked.items() if "device" in given}
    assert set(defaults.values()) == {"auto"}
    assert {"Session", "evaluate", "fit", "load", "prune", "recover", "session"} <= set(defaults)


def test_stages_are_logged_once_however_often_they_are_wrapped(records):
    seen = []
    progress = logged(logged(lambda *now: seen.append(now)))
    for done in (0, 1, 2):
        progress("calibrate", done, 2)
    progress("evaluate", 5, 5)  # all there already: nothing was done
    assert len(seen) == 4 and [line.split(",")[0] for line in messages(records)] == [
        "calibrate: 0 of 2",
        "calibrate: all 2",
    ]


_SILENT = """
import sys, ppf
run = ppf.Run(sys.argv[1])
run.prune(ratio=0.4, device="cpu").save_pretrained(sys.argv[2])
"""


def test_a_library_prints_nothing(tiny_run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _SILENT, tiny_run / "run", tmp_path / "out"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and (tmp_path / "out" / "ppf.json").exists()


_TOGETHER = """
import json, sys, ppf
from ppf import ranks
ranks.start()
run = ppf.Run(sys.argv[1])
small = run.prune(ratio=0.4, search=6, device="cpu")
report = small.save_pretrained(sys.argv[2])
values = run.evaluate([small.policy, run.policy(0.2).policy, run.grid.dense()], device="cpu")
with open(f"{sys.argv[2]}-{ranks.rank()}.json", "w") as file:
    json.dump([ranks.world(), small.policy.to_dict(), report["measured"], values], file)
ranks.stop()
"""


def test_two_processes_get_the_answers_of_one(copied, tmp_path):
    """The same calls in all of them: one searches and writes, the other evaluates for it."""
    alone = shutil.copytree(copied.path, tmp_path / "alone")
    for processes, run, output in ((2, copied.path, "two"), (1, alone, "one")):
        forked_together(processes, _TOGETHER, run, tmp_path / output)
    first, second, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two-0", "two-1", "one-0"))
    assert first == second == [2, *one[1:]] and one[0] == 1
    assert report_of(tmp_path / "two")["files"] == report_of(tmp_path / "one")["files"]
