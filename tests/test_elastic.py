"""The elastic model: views of a run's weights against the checkpoints that the same policies make."""

from __future__ import annotations

import pytest
import torch
from test_runtime import GREEDY, prompts, served  # noqa: F401  (the fixture)
from transformers import GenerationMixin

import ppf
from ppf.deliver.elastic import model as elastic
from ppf.deliver.elastic.model import ElasticLlamaForCausalLM
from ppf.errors import InputError, PPFError
from ppf.model.policy import Policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICY = Policy([2, 0, 1, 3], [64, 8, 0, 40])


@pytest.fixture(scope="module")
def run(tiny_run) -> ppf.Run:
    return ppf.Run(tiny_run / "run", DEVICE)


@pytest.fixture(scope="module", params=[True, False], ids=["refit", "no refit"])
def refit(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def loaded(tiny_run, refit) -> ElasticLlamaForCausalLM:
    return ppf.load(tiny_run / "run", DEVICE, elastic=True, refit=refit)


@pytest.fixture
def model(loaded):
    """Dense, as after loading."""
    loaded.set_ratio(0)
    return loaded


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def close(a, b) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_starts_dense(model, run):
    inputs = prompts(7)
    assert model.ratio == 0 and close(logits(model, inputs), logits(run.dense, inputs))


def test_every_policy_is_the_checkpoint_it_makes(model, run, refit, served):  # noqa: F811
    """Logits and generated tokens; back and forth, so that nothing of the policy before is left."""
    inputs = prompts(7, 3)
    other = run.policy(0.4).policy
    for policy in (POLICY, other, run.grid.dense(), POLICY):
        shrunk = run.materialize(policy, refit=refit)
        model.set_policy(policy)
        assert model.policy == policy and close(logits(model, inputs)[:, -1], logits(shrunk, inputs)[:, -1])
        got = model.generate(**inputs, max_new_tokens=12, **GREEDY)
        assert torch.equal(got, GenerationMixin.generate(shrunk, **inputs, max_new_tokens=12, **GREEDY))
        assert torch.equal(got, GenerationMixin.generate(model, **inputs, max_new_tokens=12, **GREEDY))
    assert len(served) == 4


def test_refits_differ_from_plain_columns(model, run, refit):
    """Negative control of the test above: the other kind of output projection is noticed."""
    model.set_policy(POLICY)
    assert not close(logits(model, prompts(7)), logits(run.materialize(POLICY, refit=not refit), prompts(7)))


def test_ratios_are_the_run_s(model, run):
    for ratio in (0.01, 0.07, 0.355, 0.6):  # known from loading on, and asked for
        assert model.set_ratio(ratio) == run.policy(ratio).policy
    assert model.set_ratio(0.3) == run.policy(0.3).policy == model.policy
    assert model.ratio == run.policy(0.3).delivered_ratio
    with model.at(0.5) as inside:
        assert inside is model and model.policy == run.policy(0.5).policy
        with model.at(POLICY):
            assert model.policy == POLICY
        assert model.policy == run.policy(0.5).policy
    assert model.policy == run.policy(0.3).policy
    with pytest.raises(ZeroDivisionError), model.at(0.5):
        1 / 0  # noqa: B018
    assert model.policy == run.policy(0.3).policy


def test_nothing_is_copied(model):
    """Weights of any policy lie in the dense ones' memory."""
    model.set_policy(POLICY)
    q, dense = model.model.layers[0].self_attn.q_proj.weight, model._weights.layers[0].q
    assert q.data_ptr() == dense.data_ptr() and len(q) < len(dense)
    assert model.model.layers[0].mlp.down_proj.weight.data_ptr() == model._weights.layers[0].down.data_ptr()


def storages(layers) -> dict[int, int]:
    """Address and bytes of all memory behind the tensors of plan layers."""
    parts = [part for layer in layers for part in (layer.attention, layer.ffn) if part is not None]
    tensors = [tensor for part in parts for tensor in vars(part).values()]
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def test_a_policy_takes_its_refits_and_nothing_else(model, run, refit):
    dense = storages(model._dense_plan.layers)
    model.set_policy(POLICY)
    added = {at: size for at, size in storages(model._plan(POLICY).layers).items() if at not in dense}
    s, size = run.structure, run.weights.dtype.itemsize
    rows = [groups * s.group_rows for groups in POLICY.attention if 0 < groups < s.kv_groups]
    rows += [channels for channels in POLICY.ffn if 0 < channels < s.channels]
    assert sum(added.values()) == (sum(rows) * s.hidden * size if refit else 0)


def test_attached_again_it_is_dense(tiny_run, run, refit):
    """Whatever policy was in force: what is attached is not a view of it."""
    model = ppf.load(tiny_run / "run", DEVICE, elastic=True, refit=refit)
    model.set_policy(POLICY)
    model.attach(model._grid, model._weights, model._library, lambda ratio: POLICY)
    inputs = prompts(7)
    assert model.ratio == 0 and close(logits(model, inputs), logits(run.dense, inputs))
    model.set_ratio(0.3)
    assert model.policy == POLICY and model.set_ratio(0.0) == run.grid.dense()
    assert close(logits(model, inputs), logits(run.dense, inputs))


def test_a_cache_of_another_policy_is_refused(model):
    inputs = prompts(6)
    cache = model(**inputs, use_cache=True).past_key_values
    following = {"input_ids": inputs["input_ids"][:, :1], "past_key_values": cache}
    model(**following)
    model.set_policy(POLICY)
    with pytest.raises(InputError, match="made under another policy"):
        model(**following)
    with pytest.raises(InputError, match="made under another policy"):
        model.generate(torch.cat((inputs["input_ids"], inputs["input_ids"]), 1), past_key_values=cache, **GREEDY)
    model.set_ratio(0)
    model(**following)


def test_no_switch_during_a_generation(model, served):  # noqa: F811
    class Switch:
        def put(self, value):
            model.set_policy(POLICY)

        def end(self):
            pass

    inputs = prompts(5)
    before = model.generate(**inputs, max_new_tokens=5, **GREEDY)

    class Late(Switch):
        first = True

        def put(self, value):  # the prompt comes before the generation begins
            if not self.first:
                super().put(value)
            self.first = False

    with pytest.raises(PPFError, match="while a generation is running"):
        model.generate(**inputs, max_new_tokens=5, streamer=Late(), **GREEDY)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5, **GREEDY), before)


def test_kept_policies_are_bounded(model, run, monkeypatch):
    monkeypatch.setattr(elastic, "MAX_POLICIES", 3)
    model.prepare([0.1 * n for n in range(1, 7)], batch=2, length=64)
    assert len(model._plans) == 3 and model.ratio == 0
    model.set_ratio(0.1)
    assert close(
        logits(model, prompts(4)), logits(run.materialize(model.policy, refit=model._library is not None), prompts(4))
    )


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda m: m.set_ratio(0.999), "ratio"),
        (lambda m: m.set_ratio(float("nan")), "ratio"),
        (lambda m: m.set_policy(Policy([1, 1, 1, 1], [64, 64, 64, 63])), "policy.ffn[3]"),
        (lambda m: m.half(), "model"),
        (lambda m: m.save_pretrained("anywhere"), "model"),
    ],
)
def test_bad_requests_change_nothing(call, field, model):
    model.set_policy(POLICY)
    before = logits(model, prompts(4))
    with pytest.raises(InputError) as caught:
        call(model)
    assert caught.value.field == field and model.policy == POLICY
    assert torch.equal(logits(model, prompts(4)), before) and model.to(DEVICE) is model


def test_runs_and_checkpoints_are_told_apart(tiny_run):
    with pytest.raises(InputError, match="elastic=True"):
        ppf.load(tiny_run / "run")
    with pytest.raises(InputError, match="run.json"):
        ppf.load(tiny_run / "model", elastic=True)


def test_another_dtype(tiny_run):
    model = ppf.load(tiny_run / "run", DEVICE, torch.bfloat16, elastic=True)
    model.set_policy(POLICY)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and logits(model, prompts(4)).isfinite().all()
