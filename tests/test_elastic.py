"""The elastic model: views of a run's weights against the checkpoints that the same policies make."""

from __future__ import annotations

import pytest
import torch
from factories import model_of, random_ranking
from runtime_cases import GREEDY, prompts, requests_served
from transformers import GenerationMixin, PreTrainedModel

import ppf
from ppf.deliver.elastic import model as elastic
from ppf.deliver.elastic.model import elastic_class, elastic_model
from ppf.errors import InputError, PPFError
from ppf.families import families, family_of
from ppf.fast.permute import permuted
from ppf.fast.runtime.plan import plan_of
from ppf.fitting.materialize import materialize
from ppf.fitting.session import Session
from ppf.model.build import policy_of
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICY = Policy([2, 0, 1, 3], [64, 8, 0, 40])


@pytest.fixture(autouse=True)
def served(monkeypatch, one_thread):
    return requests_served(monkeypatch)


@pytest.fixture(scope="module")
def run(tiny_run) -> ppf.Run:
    return ppf.Run(tiny_run / "run")


@pytest.fixture(scope="module")
def session(run) -> Session:
    return Session(run, DEVICE)


@pytest.fixture(scope="module")
def source(session) -> PreTrainedModel:
    """The run's dense model."""
    return session.materialize(session.run.grid.dense())


@pytest.fixture(scope="module", params=[True, False], ids=["refit", "no refit"])
def refit(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def loaded(tiny_run, refit) -> PreTrainedModel:
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


def test_starts_dense(model, source):
    inputs = prompts(7)
    assert model.ratio == 0 and close(logits(model, inputs), logits(source, inputs))


def test_every_policy_is_the_checkpoint_it_makes(model, run, session, refit, served):
    """Logits and generated tokens; back and forth, so that nothing of the policy before is left."""
    inputs = prompts(7, 3)
    other = run.policy(0.4).policy
    for policy in (POLICY, other, run.grid.dense(), POLICY):
        shrunk = session.materialize(policy, refit=refit)
        model.set_policy(policy)
        assert model.policy == policy and close(logits(model, inputs)[:, -1], logits(shrunk, inputs)[:, -1])
        got = model.generate(**inputs, max_new_tokens=12, **GREEDY)
        assert torch.equal(got, GenerationMixin.generate(shrunk, **inputs, max_new_tokens=12, **GREEDY))
        assert torch.equal(got, GenerationMixin.generate(model, **inputs, max_new_tokens=12, **GREEDY))
    assert len(served) == 4


def test_refits_differ_from_plain_columns(model, session, refit):
    """Negative control of the test above: the other kind of output projection is noticed."""
    model.set_policy(POLICY)
    assert not close(logits(model, prompts(7)), logits(session.materialize(POLICY, refit=not refit), prompts(7)))


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
    layer, dense = model.model.layers[0], model._decoder.layers[0]
    q, down = layer.self_attn.q_proj.weight, layer.mlp.down_proj.weight
    assert q.data_ptr() == dense["self_attn.q_proj.weight"].data_ptr()
    assert len(q) < len(dense["self_attn.q_proj.weight"])
    assert down.data_ptr() == dense["mlp.down_proj.weight"].data_ptr()


def storages(layers) -> dict[int, int]:
    """Address and bytes of all memory behind the tensors of plan layers."""
    parts = [part for layer in layers for part in (layer.attention, layer.ffn) if part is not None]
    found = [tensor.untyped_storage() for part in parts for tensor in part.tensors()]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def test_a_policy_takes_its_refits_and_nothing_else(model, run, refit):
    dense = storages(model._dense_plan.layers)
    model.set_policy(POLICY)
    added = {at: size for at, size in storages(model._form(POLICY).plan.layers).items() if at not in dense}
    s = run.structure
    columns = [
        width * sublayer.columns
        for kind in POLICY
        for width, sublayer in zip(POLICY[kind], s.of(kind), strict=True)
        if 0 < width < sublayer.units
    ]
    assert sum(added.values()) == (sum(columns) * s.hidden * model.dtype.itemsize if refit else 0)


def test_what_it_runs_is_what_it_holds(model, served):
    """The runtime's plan of every policy is the one that its modules make."""
    for policy in (POLICY, model._grid.dense(), Policy([1, 2, 0, 0], [8, 0, 16, 64])):
        model.set_policy(policy)
        pairs = zip(plan_of(model).layers, model._form(policy).plan.layers, strict=True)
        for found, kept in pairs:
            for name in ("attention", "ffn"):
                parts = [getattr(layer, name) for layer in (found, kept)]
                assert (parts[0] is None) == (parts[1] is None)
                if parts[0] is not None:
                    tensors = zip(parts[0].tensors(), parts[1].tensors(), strict=True)
                    assert all(a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in tensors)


def test_attached_again_it_is_dense(tiny_run, run, source, refit):
    """Whatever policy was in force: what is attached is not a view of it."""
    model = ppf.load(tiny_run / "run", DEVICE, elastic=True, refit=refit)
    model.set_policy(POLICY)
    model.attach(model._grid, model._decoder, model._library, lambda ratio: POLICY)
    inputs = prompts(7)
    assert model.ratio == 0 and close(logits(model, inputs), logits(source, inputs))
    model.set_ratio(0.3)
    assert model.policy == POLICY and model.set_ratio(0.0) == run.grid.dense()
    assert close(logits(model, inputs), logits(source, inputs))


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


def test_no_switch_during_a_generation(model, served):
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


def test_kept_policies_are_bounded(model, session, monkeypatch):
    monkeypatch.setattr(elastic, "MAX_POLICIES", 3)
    model.prepare([0.1 * n for n in range(1, 7)], batch=2, length=64)
    assert len(model._forms) == 3 and model.ratio == 0
    model.set_ratio(0.1)
    shrunk = session.materialize(model.policy, refit=model._library is not None)
    assert close(logits(model, prompts(4)), logits(shrunk, prompts(4)))


def test_static_caches(model):
    """transformers makes them for the widths in force, whatever the configuration says."""
    model.set_policy(POLICY)
    inputs = prompts(6)
    wanted = GenerationMixin.generate(model, **inputs, max_new_tokens=8, **GREEDY)
    static = GenerationMixin.generate(model, **inputs, max_new_tokens=8, cache_implementation="static", **GREEDY)
    assert torch.equal(static, wanted)


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


FUSED = {"phi3"}
SERVED = {"llama", "mistral", "qwen2", "qwen3"}
POLICIES = {  # what a family with whole attention can have, and the others
    True: [Policy([3, 0, 3, 0], [64, 8, 0, 40]), Policy([3, 3, 0, 3], [0, 64, 64, 8])],
    False: [POLICY, Policy([1, 3, 0, 2], [0, 64, 16, 8])],
}


def elastic_and_dense(family: str, **changes) -> tuple[PreTrainedModel, Decoder, list, Grid]:
    decoder = Decoder.of_model(model_of(family, **changes).to(DEVICE))
    ranking, grid = random_ranking(decoder.structure), Grid(decoder.structure, 8)
    ranked = permuted(decoder, ranking)
    model = elastic_model(ranked)
    model.attach(grid, ranked, None, lambda ratio: grid.dense())
    return model, decoder, ranking, grid


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "tie_word_embeddings": True}], ids=["", "changed"])
@pytest.mark.parametrize("family", [family.model_type for family in families() if family.model_type not in FUSED])
def test_every_family(family, changes, served):
    """Every policy is the checkpoint it makes, by transformers' path and by the runtime where it serves the family."""
    model, decoder, ranking, grid = elastic_and_dense(family, **changes)
    inputs = prompts(20, 3)
    for policy in (
        *POLICIES[decoder.family.attention.whole],
        grid.dense(),
        POLICIES[decoder.family.attention.whole][0],
    ):
        shrunk = materialize(decoder, ranking, grid, policy)
        assert policy_of(shrunk.config) == policy
        model.set_policy(policy)
        assert close(logits(model, inputs)[:, -1], logits(shrunk, inputs)[:, -1])
        got = model.generate(**inputs, max_new_tokens=6, **GREEDY)
        assert torch.equal(got, GenerationMixin.generate(shrunk, **inputs, max_new_tokens=6, **GREEDY))
    assert len(served) == (4 if family in SERVED else 0)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in shrunk.parameters())


def test_a_source_of_uneven_layers(served):
    """A result of PPF is pruned again: what its layers lack stays absent."""
    decoder = Decoder.of_model(model_of("qwen3").to(DEVICE))
    ranking, grid = random_ranking(decoder.structure), Grid(decoder.structure, 8)
    first = Decoder.of_model(materialize(decoder, ranking, grid, POLICY))
    ranking, grid = random_ranking(first.structure), Grid(first.structure, 8)
    ranked = permuted(first, ranking)
    model = elastic_model(ranked)
    model.attach(grid, ranked, None, lambda ratio: grid.dense())
    inputs = prompts(9, 4)
    for policy in (Policy([1, 0, 1, 2], [64, 0, 0, 16]), grid.dense(), Policy([2, 0, 0, 1], [8, 8, 0, 40])):
        shrunk = materialize(first, ranking, grid, policy)
        model.set_policy(policy)
        got = model.generate(**inputs, max_new_tokens=6, **GREEDY)
        assert torch.equal(got, GenerationMixin.generate(shrunk, **inputs, max_new_tokens=6, **GREEDY))
    assert len(served) == 3 and model.policy == policy


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_of_some_layers(family, served):
    """Also where the first layer with a window has no attention: transformers takes a text's length from its cache."""
    changes = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    model, decoder, ranking, grid = elastic_and_dense(family, **changes)
    inputs = prompts(20, 3)
    for policy in (POLICY, grid.dense(), Policy([3, 1, 0, 2], [64, 8, 8, 0])):
        model.set_policy(policy)
        shrunk = materialize(decoder, ranking, grid, policy)
        wanted = GenerationMixin.generate(shrunk, **inputs, max_new_tokens=12, use_cache=False, **GREEDY)
        for result in (model.generate, lambda **k: GenerationMixin.generate(model, **k)):
            assert torch.equal(result(**inputs, max_new_tokens=12, **GREEDY), wanted)
    assert len(served) == 3


@pytest.mark.parametrize("family", FUSED)
def test_fused_projections_are_refused(family):
    with pytest.raises(InputError, match="in one matrix") as caught:
        elastic_class(family_of(family))
    assert caught.value.value == family


def test_a_switch_walks_no_modules(monkeypatch):
    """Switching between kept policies is assignments only."""
    model, *_, grid = elastic_and_dense("llama")
    model.set_policy(POLICY)

    def walked(*arguments, **named):
        raise AssertionError("walked")

    for name in ("named_modules", "named_parameters", "state_dict", "get_parameter", "get_submodule"):
        monkeypatch.setattr(torch.nn.Module, name, walked)
    for policy in (grid.dense(), POLICY, grid.dense()):
        model.set_policy(policy)
    assert model.policy == grid.dense()


def test_runs_and_checkpoints_are_told_apart(tiny_run):
    with pytest.raises(InputError, match="elastic=True"):
        ppf.load(tiny_run / "run")
    with pytest.raises(InputError, match="run.json"):
        ppf.load(tiny_run / "model", elastic=True)


def test_another_dtype(tiny_run):
    model = ppf.load(tiny_run / "run", DEVICE, torch.bfloat16, elastic=True)
    model.set_policy(POLICY)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and logits(model, prompts(4)).isfinite().all()
