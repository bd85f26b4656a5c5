"""Profiles: what is timed, how differences are shared out, and that the sum meets whole models."""

import json
import shutil

import pytest
import torch
from cli_cases import answer, refusal
from factories import byte_tokenizer, config_of, dense_weights, llama, model_of

from ppf.choose.budget import PROFILE, Profile
from ppf.deliver import profiling
from ppf.deliver.profiling import _spread, measure_profile
from ppf.errors import InputError
from ppf.fast.permute import identity
from ppf.fast.timing import Workload, check_workload, milliseconds
from ppf.fitting.materialize import materialize
from ppf.fitting.run import Run
from ppf.model.build import policy_of, pruned_config
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


def builder_of(decoder: Decoder, multiple: int):
    grid = Grid(decoder.structure, multiple)
    return grid, lambda policy: materialize(decoder, identity(decoder), grid, policy)


@pytest.fixture(scope="module")
def builder():
    return builder_of(dense_weights()[1], 8)


def made_up(policy: Policy) -> float:
    """A clock that adds up: 3 ms, 0.4 ms a kv-group with a jump, 0.01 ms a channel."""
    attention = sum(0.4 * n + 0.1 * (n > 2) for n in policy.attention)
    return 3 + attention + sum(0.01 * w for w in policy.ffn)


def test_differences_are_shared_out_exactly(builder, monkeypatch):
    grid, build = builder
    monkeypatch.setattr(profiling, "milliseconds", lambda model, _: made_up(policy_of(model.config)))
    seen = []
    profile = measure_profile(grid, build, Workload("prefill", 1, 8), lambda *event: seen.append(event))
    assert profile.constant == pytest.approx(3)
    assert profile.attention == pytest.approx([0, 0.4, 0.8, 1.3])
    assert profile.ffn == pytest.approx([0.08 * n for n in range(9)])
    assert [event[1] for event in seen] == list(range(1, len(seen) + 1)) and seen[-1][1] <= seen[-1][2]
    uneven = Policy([1, 3, 0, 2], [64, 0, 8, 40])
    assert float(profile.costs(grid).of(grid.encode([uneven]))[0]) == pytest.approx(made_up(uneven))


def test_attention_that_goes_as_a_whole_has_two_levels(monkeypatch):
    grid, build = builder_of(dense_weights(family="olmo2")[1], 8)
    monkeypatch.setattr(profiling, "milliseconds", lambda model, _: made_up(policy_of(model.config)))
    profile = measure_profile(grid, build, Workload("prefill", 1, 8))
    assert profile.attention == pytest.approx([0, 1.3]) and profile.constant == pytest.approx(3)
    uneven = Policy([3, 3, 0, 0], [64, 0, 8, 40])
    assert float(profile.costs(grid).of(grid.encode([uneven]))[0]) == pytest.approx(made_up(uneven))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_real_models_are_timed(builder, phase):
    grid, build = builder
    workload = Workload(phase, 2, 16)
    assert 0 < milliseconds(build(grid.dense()), workload) < 1000
    profile = measure_profile(grid, build, workload)
    assert len(profile.attention) == 4 and len(profile.ffn) == 9 and profile.constant >= 0


@pytest.mark.parametrize("limit", [1, 2, 23, 24, 25, 40, 172])
def test_spread_levels_cover_the_range(limit):
    levels = _spread(limit)
    assert levels[-1] == limit and levels[0] >= 1 and len(levels) == min(limit, 24)
    assert max(b - a for a, b in zip(levels, levels[1:], strict=False)) <= -(-limit // 24) if limit > 1 else True


def test_workloads_fit_the_model():
    check_workload(Workload("decode", 1, 127), 128)
    for workload, field in ((Workload("decode", 0, 8), "batch"), (Workload("prefill", 1, 0), "prefill")):
        with pytest.raises(InputError, match=field):
            check_workload(workload, 128)
    with pytest.raises(InputError, match="context of 128"):
        check_workload(Workload("decode", 1, 128), 128)


def test_the_command_writes_what_latency_budgets_read(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "run", tmp_path / "run")
    options = "--prefill", 24, "--decode", 24, "--device", "cpu"
    for _ in range(5):  # a busy machine's table may be flat: widths so small differ by microseconds
        data = answer("profile", tmp_path / "run", *options)
        run = Run(tmp_path / "run")
        least, most = Profile.from_dict(data["profiles"]["prefill"]).costs(run.grid).range(run.grid)
        if most > 1.01 * least:
            break
    stored = json.loads((tmp_path / "run" / PROFILE).read_text())
    assert stored["profiles"] == data["profiles"] and stored["runner"] == "transformers"
    assert data["profiles"]["prefill"]["workload"] == {"phase": "prefill", "batch": 1, "tokens": 24}
    asked = least + 0.6 * (most - least)
    report = answer("prune", run.path, "--latency-ms", asked, "--device", "cpu", "--output", tmp_path / "out")
    assert report["budget"]["delivered"] > 0 and report["budget"]["workload"]["tokens"] == 24
    assert 0.5 * asked < report["budget"]["predicted"] <= asked * (1 + 1e-9)  # a busy machine's table is coarse


def test_a_model_needs_an_output(tiny_run, tmp_path):
    refusal("profile", tiny_run / "model", "--device", "cpu", field="output")
    given = "profile", tiny_run / "model", "--device", "cpu", "--ffn-multiple", 32, "--prefill", 16, "--decode", 16
    data = answer(*given, "--output", tmp_path / "profile.json")
    assert len(data["profiles"]["decode"]["ffn"]) == 3 and (tmp_path / "profile.json").exists()
    refusal("profile", tiny_run / "run", "--device", "cpu", "--prefill", 400, field="prefill")


def test_layers_that_differ_are_refused_before_any_work(tmp_path):
    config = pruned_config(config_of("qwen2"), Policy([3, 0, 2, 3], [64, 32, 0, 64]))
    llama(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    given = "profile", tmp_path / "model", "--device", "cpu", "--ffn-multiple", 8, "--output", tmp_path / "profile.json"
    message = refusal(*given, field="model", value=tmp_path / "model")
    assert "layers of this model differ; latency budgets need equal layers" in message
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_sum_meets_whole_models_on_a_gpu(family):
    """Uneven policies of a model whose sub-layers take long enough to be timed: within a tenth."""
    model = model_of(
        family, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=2048,
    )  # fmt: skip
    grid, build = builder_of(Decoder.of_model(model.to("cuda", torch.bfloat16)), 256)
    for workload in (Workload("prefill", 1, 1024), Workload("decode", 1, 512)):
        profile = measure_profile(grid, build, workload)
        policy = Policy([8, 2, 4, 0, 6, 8, 1, 5], [2816, 1024, 0, 2048, 512, 1280, 2816, 256])
        predicted = float(profile.costs(grid).of(grid.encode([policy]))[0])
        assert milliseconds(build(policy), workload) == pytest.approx(predicted, rel=0.1)
