"""Rankings by gradients against transformers' own gradients and naive sums, and through a whole fit."""

import pytest
import torch
from factories import config_of, dense_weights, llama, model_of, quick_learning, tokens

import ppf
from ppf.families import KINDS
from ppf.fitting.ranking import check_ranking, rank_layer
from ppf.fitting.ranking.gradient import GRADIENT_RANKINGS, _channels, gradient_scores, loraprune, taylor
from ppf.fitting.run import Run, Settings
from ppf.fitting.session import Session
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = 8  # rows that a kv-group has of keys, and of values
NAMES = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def saliences(layer, name: str) -> list[torch.Tensor]:
    """|w·∂L/∂w| of a projection's weight, and of its bias if there is one."""
    module = layer.get_submodule(name)
    there = [tensor for tensor in (module.weight, module.bias) if tensor is not None]
    return [(tensor * tensor.grad).abs().detach() for tensor in there]


def rows(layer, name: str, start: int, count: int) -> torch.Tensor:
    return sum(part[start : start + count].sum() for part in saliences(layer, name))


def group_salience(layer, fused: bool, group: int, columns: int, groups: int) -> torch.Tensor:
    """Of all weights and biases that go with a kv-group."""
    total = saliences(layer, "self_attn.o_proj")[0][:, group * columns : (group + 1) * columns].sum()
    if fused:
        places = (0, columns), (groups * columns, KEY), (groups * (columns + KEY), KEY)
        return total + sum(rows(layer, "self_attn.qkv_proj", start + group * n, n) for start, n in places)
    sizes = {"q": columns, "k": KEY, "v": KEY}
    return total + sum(rows(layer, f"self_attn.{n}_proj", group * size, size) for n, size in sizes.items())


def channel_salience(layer, fused: bool) -> torch.Tensor:
    """Of all weights that go with each channel."""
    total = saliences(layer, "mlp.down_proj")[0].sum(0)
    if fused:
        return total + saliences(layer, "mlp.gate_up_proj")[0].sum(1).view(2, -1).sum(0)
    return total + sum(saliences(layer, f"mlp.{n}_proj")[0].sum(1) for n in ("gate", "up"))


@pytest.mark.parametrize(
    ("family", "heads"),
    [("llama", "mha"), ("llama", "gqa"), ("qwen2", "gqa"), ("phi3", "gqa"), ("gemma2", "gqa"), ("granite", "gqa")],
)
def test_taylor_is_transformers_gradient_times_the_weights(family, heads):
    """Biases count with the rows that they belong to; fused projections are cut where their parts begin."""
    model, decoder = dense_weights(heads, family)
    ids = tokens(5, 24)
    found = taylor(decoder, ids)
    model.requires_grad_()
    model(input_ids=ids, labels=ids).loss.backward()
    layer, attention = model.model.layers[2], decoder.structure.attention[2]
    fused = family == "phi3"
    assert (layer.self_attn.o_proj.weight.grad != 0).any()
    torch.testing.assert_close(found[2]["ffn"], channel_salience(layer, fused), rtol=1e-3, atol=1e-6)
    groups = found[2]["attention"].view(attention.units, -1).sum(1)
    for g in range(attention.units):
        whole = group_salience(layer, fused, g, attention.columns, attention.units)
        torch.testing.assert_close(groups[g], whole, rtol=1e-3, atol=1e-6)


def test_biases_count():
    """Negative control of the test above: without them the queries, keys and values of Qwen2 have other scores."""
    _, decoder = dense_weights("gqa", "qwen2")
    salience = {n: torch.ones_like(t) for n, t in decoder.layers[2].items() if "_proj" in n}
    with_bias = _channels(decoder, 2, salience)["attention"]
    without = _channels(decoder, 2, {n: t for n, t in salience.items() if "bias" not in n})["attention"]
    # One of a query; those of a key and of a value serve two heads.
    torch.testing.assert_close(with_bias - without, torch.full((48,), 1 + 2 / 2))


def test_loraprune_first_step_is_the_gradient_through_a_random_projection(monkeypatch):
    """With B zero, ĝ is B′A = G·Aᵀ·A: the true gradient G projected twice."""
    monkeypatch.setattr("ppf.fitting.ranking.gradient._STEPS", 1)
    model, decoder = dense_weights()
    ids = tokens(40, 24)
    found = loraprune(decoder, ids, seed=3)
    generator = torch.Generator().manual_seed(3)
    first = decoder.layers[0]
    drawn = {n: torch.randn(8, first[f"{n}.weight"].shape[1], generator=generator) for n in NAMES}
    batch = ids[torch.arange(2048 // 24) % 40]
    model.requires_grad_()
    model(input_ids=batch, labels=batch).loss.backward()
    parts = {}
    for name in NAMES:
        weight = model.model.layers[0].get_submodule(name).weight
        a = drawn[name] / weight.shape[1] ** 0.5
        parts[f"{name}.weight"] = (weight.grad @ a.T @ a * weight).abs().detach()
    expected = _channels(decoder, 0, parts)
    for kind in KINDS:
        torch.testing.assert_close(found[0][kind], expected[kind], rtol=1e-3, atol=1e-7)


IRREGULAR = Policy([3, 0, 2, 1], [64, 16, 0, 40])
MODELS = {
    "llama": lambda: model_of("llama"),
    "phi3": lambda: model_of("phi3"),
    "half of a Qwen2": lambda: llama(pruned_config(config_of("qwen2"), IRREGULAR)),
}


@pytest.mark.parametrize("name", GRADIENT_RANKINGS)
@pytest.mark.parametrize("model", MODELS)
def test_scores_are_finite_positive_and_repeatable(name, model, monkeypatch):
    monkeypatch.setattr("ppf.fitting.ranking.gradient._STEPS", 4)
    decoder = Decoder.of_model(MODELS[model]())
    first, again = (gradient_scores(name, decoder, tokens(6, 24), 1) for _ in range(2))
    for index, (one, two) in enumerate(zip(first, again, strict=True)):
        for kind in KINDS:
            a, b = one[kind], two[kind]
            assert torch.equal(a, b) and a.isfinite().all() and (a >= 0).all()
            assert len(a) == decoder.structure.of(kind)[index].width and (not len(a) or a.std() > 0)
        ranking = rank_layer(name, decoder, index, None, one)
        assert sorted(ranking.ffn.tolist()) == list(range(decoder.structure.ffn[index].units))
    assert not any(tensor.requires_grad for layer in decoder.layers for tensor in layer.values())


@pytest.mark.parametrize("name", GRADIENT_RANKINGS)
def test_a_fit_ranks_by_them(name, tiny_run, tmp_path, monkeypatch):
    quick_learning(monkeypatch)
    settings = Settings(24, ranking=name, ffn_multiple=16, sequence_length=32, calibration_tokens=1024)
    ppf.fit(tiny_run / "model", tiny_run / "text.txt", tmp_path / "run", settings=settings, device="cpu")
    run = Run(tmp_path / "run")
    decoder = Session(run, "cpu").decoder
    scores = gradient_scores(name, decoder, run.sequences("calibration"), 0)
    for index, ranking in enumerate(run.ranking):
        expected = rank_layer(name, decoder, index, None, scores[index])
        assert torch.equal(ranking.ffn, expected.ffn) and torch.equal(ranking.attention, expected.attention)


def test_names():
    for name in (*GRADIENT_RANKINGS, "cfsp", "wanda-sp"):
        check_ranking(name)
    with pytest.raises(ppf.InputError, match="taylor, loraprune"):
        check_ranking("gradient")
