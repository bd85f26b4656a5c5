"""``ppf bench``: what it measures, says and refuses."""

from __future__ import annotations

import itertools

import pytest
import torch
from cli_cases import answer, ppf, refusal
from factories import TINY, llama, llama_config, model_of

from ppf._version import versions
from ppf.families import families
from ppf.fast.runtime import benchmark
from ppf.fast.runtime.benchmark import Ceilings
from ppf.fast.runtime.plan import plan_of
from ppf.model.policy import Policy

# Enough new tokens that a machine with other work does not take longer for the first than for all of them.
SHORT = ["--prompt", 4, "--new-tokens", 24, "--prefill", 8]
ON_CPU = ["--device", "cpu"]


def test_a_checkpoint(one_thread, monkeypatch):
    monkeypatch.setattr(benchmark, "_WARM_UP", dict.fromkeys(benchmark.RUNNERS, 1))
    data = answer("bench", TINY, *SHORT, "--batches", "1,2", *ON_CPU)
    measured = [(r["phase"], r["runner"], r["batch"]) for r in data["rows"]]
    assert measured == [(p, r, b) for b in (1, 2) for r in ("ppf", "eager") for p in ("prefill", "decode")]
    for row in data["rows"]:
        assert row["milliseconds"] > 0 and row["tokens_per_second"] > 0 and row["ratio"] == 0
        assert row["share_of_limit"] == pytest.approx(row["limit_milliseconds"] / row["milliseconds"])
    assert data["device"].startswith("CPU") and data["versions"] == versions()


def test_steps_lost_in_other_work(monkeypatch, one_thread):
    """A negative time of a step is no measurement."""
    times = itertools.count(1)  # each call takes longer than the one before: the first token than all of them
    monkeypatch.setattr(benchmark, "_median", lambda call, device, repeats: next(times))
    refusal("bench", TINY, *SHORT, "--runners", "ppf", *ON_CPU, field="new-tokens", value=24)


def test_a_run_at_several_sizes(tiny_run, tmp_path, one_thread):
    """One elastic model; smaller models have less to read and to multiply. Table and plot are written."""
    pytest.importorskip("matplotlib")
    plot = tmp_path / "speed.svg"
    arguments = [tiny_run / "run", "--ratios", "0,0.5", "--runners", "ppf", *SHORT, *ON_CPU]
    rows = answer("bench", *arguments)["rows"]
    limits = {(r["phase"], r["ratio"]): r["limit_milliseconds"] for r in rows}
    assert set(limits) == {(p, r) for p in ("prefill", "decode") for r in (0.0, 0.5)}
    assert all(limits[p, 0.5] < limits[p, 0.0] for p in ("prefill", "decode"))
    shown = ppf("bench", *arguments, "--plot", plot)
    assert shown.exit_code == 0 and "of limit" in shown.stdout and plot.read_text().startswith("<?xml")


def test_bytes_and_operations_of_a_model():
    """By hand, for the tiny grouped-query model: 4 layers, 48 hidden, 3 kv-groups of 2 heads of 8, 64 channels."""
    plan = plan_of(llama(llama_config()))
    layer = 48 * 48 * 2 + 2 * 24 * 48 + 3 * 64 * 48
    assert plan.read_bytes() == 4 * (4 * (layer + 2 * 48) + 48 + 258 * 48)
    assert benchmark.prefill_operations(plan, 2, 10) == 2 * (2 * 4 * layer * 10 + 4 * 2 * 6 * 8 * 100 + 2 * 258 * 48)


@pytest.mark.parametrize("family", [f.model_type for f in families() if "joint head norm" not in f.traits])
def test_bytes_of_every_family(family):
    """A step reads all weights but the embedding, once each, in whatever matrices they lie. (A norm over all heads
    together is in no view.)"""
    model = model_of(family)
    wanted = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    assert plan_of(model).read_bytes() == wanted


def test_biases_head_norms_and_windows_of_a_model():
    """What they add by hand: a window's keys are read and multiplied, and no others."""
    config = {"attention_bias": True, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
    plan, plain = plan_of(model_of("qwen3", **config)), plan_of(llama(llama_config()))
    assert plan.read_bytes() - plain.read_bytes() == 4 * 4 * (48 + 2 * 24 + 48 + 2 * 8)
    positions = 3 * 10 + 4
    assert benchmark._cache_bytes(plan, 2, 10) == 2 * 2 * 3 * 8 * 4 * positions
    fewer = plain.layers[0].attention.q.shape[0] * 4 * (10 * 10 - (10 * 10 - 6 * 6)) / 2
    wanted = benchmark.prefill_operations(plain, 2, 10) - 2 * fewer
    assert benchmark.prefill_operations(plan, 2, 10) == wanted and plan.reach(100) == 100


def test_a_step_is_what_more_tokens_cost(monkeypatch):
    """A call of n tokens that takes 5 + 2·(n - 1) seconds by a clock of our own: two seconds a step."""
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def caller(model, runner, ids):
        return lambda n: clock.__setitem__(0, clock[0] + 5 + 2 * (n - 1))

    monkeypatch.setattr(benchmark, "_caller", caller)
    model = llama(llama_config())
    row = benchmark.decode_row(model, "ppf", 3, 4, 11, Ceilings(1e3, 1e3), 0.0)
    assert row.milliseconds == pytest.approx(2000) and row.tokens_per_second == pytest.approx(1.5)
    read = plan_of(model).read_bytes() + 2 * 3 * 9 * 12 * 8 * 4
    assert row.limit_milliseconds == pytest.approx(read) and row.gigabytes_per_second == pytest.approx(read / 2e9)


def test_ceilings_are_of_this_device():
    ceilings = benchmark.measure_ceilings(torch.device("cpu"), torch.float32)
    assert 1e8 < ceilings.bytes_per_second < 1e13 and 1e8 < ceilings.operations_per_second < 1e15


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        (["--batches", "1,65"], "batches", 65),
        (["--batches", "one"], "batches", "one"),
        (["--runners", "ppf,vllm"], "runners", "vllm"),
        (["--new-tokens", 1], "new-tokens", 1),
        (["--prefill", 0], "prefill", 0),
        (["--prefill", 100000], "prefill", 100001),
        (["--plot", "nowhere/at/all.svg"], "plot", "nowhere"),  # or there is no matplotlib
        (["--plot", "speed.txt"], "plot", "speed.txt"),
    ],
)
def test_bad_options_are_named(change, field, value):
    refusal("bench", TINY, *change, *ON_CPU, field=field, value=value)


def test_bad_ratios_of_a_run(tiny_run):
    refusal("bench", tiny_run / "run", "--ratios", "0.2,1.5", *SHORT, *ON_CPU, field="ratios", value="1.5")


def test_policies_of_runs_are_not_dense(tiny_run):
    """Negative control of the limits above: another policy has other bytes."""
    import ppf as package

    model = package.load(tiny_run / "run", "cpu", elastic=True)
    dense = model._dense_plan.read_bytes()
    model.set_policy(Policy([1, 0, 0, 0], [8, 8, 8, 8]))
    assert plan_of(model).read_bytes() < dense / 2
