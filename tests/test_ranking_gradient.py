"""Rankings by gradients against transformers' own gradients and naive sums, and through a whole fit."""

import pytest
import torch
from factories import dense_weights, quick_learning, tokens

import ppf
from ppf.fitting.ranking import check_ranking, rank_layer
from ppf.fitting.ranking.gradient import GRADIENT_RANKINGS, _channels, gradient_scores, loraprune, taylor
from ppf.fitting.run import Run, Settings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_taylor_is_transformers_gradient_times_the_weights(heads):
    model, weights = dense_weights(heads)
    ids, s = tokens(5, 24), weights.structure
    found = taylor(weights, ids)
    model.requires_grad_()
    model(input_ids=ids, labels=ids).loss.backward()
    layer = model.model.layers[2]
    attention, mlp = layer.self_attn, layer.mlp

    def salience(module):
        return (module.weight * module.weight.grad).abs().detach()

    ffn = salience(mlp.down_proj).sum(0) + salience(mlp.gate_proj).sum(1) + salience(mlp.up_proj).sum(1)
    torch.testing.assert_close(found[2][1], ffn, rtol=1e-3, atol=1e-6)
    groups = found[2][0].view(s.kv_groups, -1).sum(1)
    for g in range(s.kv_groups):
        q, k = slice(g * s.group_rows, (g + 1) * s.group_rows), slice(g * s.head_dim, (g + 1) * s.head_dim)
        whole = salience(attention.q_proj)[q].sum() + salience(attention.o_proj)[:, q].sum()
        whole += salience(attention.k_proj)[k].sum() + salience(attention.v_proj)[k].sum()
        torch.testing.assert_close(groups[g], whole, rtol=1e-3, atol=1e-6)


def test_loraprune_first_step_is_the_gradient_through_a_random_projection(monkeypatch):
    """With B zero, ĝ is B′A = G·Aᵀ·A: the true gradient G projected twice."""
    monkeypatch.setattr("ppf.fitting.ranking.gradient._STEPS", 1)
    _, weights = dense_weights()
    ids = tokens(40, 24)
    found = loraprune(weights, ids, seed=3)
    generator = torch.Generator().manual_seed(3)
    names = "q", "k", "v", "o", "gate", "up", "down"
    first = weights.layers[0]
    drawn = {n: torch.randn(8, getattr(first, n).shape[1], generator=generator) for n in names}
    batch = ids[torch.arange(2048 // 24) % 40]
    model, _ = dense_weights()
    model.requires_grad_()
    model(input_ids=batch, labels=batch).loss.backward()
    layer = model.model.layers[0]
    modules = [getattr(layer.self_attn, f"{n}_proj") for n in names[:4]]
    modules += [getattr(layer.mlp, f"{n}_proj") for n in names[4:]]
    parts = []
    for name, module in zip(names, modules, strict=True):
        a = drawn[name] / module.weight.shape[1] ** 0.5
        parts.append((module.weight.grad @ a.T @ a * module.weight).abs().detach())
    for value, expected in zip(found[0], _channels(weights, parts), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", GRADIENT_RANKINGS)
def test_scores_are_finite_positive_and_repeatable(name):
    _, weights = dense_weights()
    first, again = (gradient_scores(name, weights, tokens(6, 24), 1) for _ in range(2))
    for one, two in zip(first, again, strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b) and a.isfinite().all() and (a >= 0).all() and a.std() > 0
    assert not any(m.requires_grad for layer in weights.layers for m in (layer.q, layer.down))


@pytest.mark.parametrize("name", GRADIENT_RANKINGS)
def test_a_fit_ranks_by_them(name, tiny_run, tmp_path, monkeypatch):
    quick_learning(monkeypatch)
    settings = Settings(24, ranking=name, ffn_multiple=16, sequence_length=32, calibration_tokens=1024)
    ppf.fit(tiny_run / "model", tiny_run / "text.txt", tmp_path / "run", settings=settings, device="cpu")
    run = Run(tmp_path / "run")
    scores = gradient_scores(name, run.weights, run.sequences("calibration"), 0)
    for index, ranking in enumerate(run.ranking):
        expected = rank_layer(name, None, None, run.structure, scores[index])
        assert torch.equal(ranking.ffn, expected.ffn) and torch.equal(ranking.attention, expected.attention)


def test_names():
    for name in (*GRADIENT_RANKINGS, "cfsp", "wanda-sp"):
        check_ranking(name)
    with pytest.raises(ppf.InputError, match="taylor, loraprune"):
        check_ranking("gradient")
