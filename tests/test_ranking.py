"""Rankings against naive loops."""

from dataclasses import replace

import pytest
import torch
from factories import config_of, dense_weights, llama, tokens

from ppf.errors import InputError, PPFError
from ppf.families import families
from ppf.fitting.calibration import Statistics, calibrate
from ppf.fitting.ranking import RANKINGS, rank_layer, ranking_named
from ppf.fitting.ranking.obs import removal_scores
from ppf.fitting.ranking.scores import Scored
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.policy import Policy

pytestmark = pytest.mark.usefixtures("one_thread")


def least_error(output, gram, gone: list[int]) -> float:
    """The smallest tr((Ŵ − W) H (Ŵ − W)ᵀ) with Ŵ zero in the columns ``gone``: what they carry, given the others."""
    kept = [j for j in range(len(gram)) if j not in gone]
    schur = gram[gone][:, gone]
    if kept:
        schur = schur - gram[gone][:, kept] @ torch.linalg.solve(gram[kept][:, kept], gram[kept][:, gone])
    return float((output[:, gone] @ schur * output[:, gone]).sum())


def naive_obs(output, x, unit: int = 1) -> torch.Tensor:
    """Remove the unit whose loss, all others refitted, costs least; again until none is left."""
    gram = x.T @ x / len(x)
    gram = gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    channels = [list(range(u * unit, (u + 1) * unit)) for u in range(len(gram) // unit)]
    left, gone, position = list(range(len(channels))), [], torch.zeros(len(gram), dtype=torch.float64)
    while left:
        cheapest = min(left, key=lambda u: least_error(output, gram, gone + channels[u]))
        position[channels[cheapest]] = len(channels) - len(left)
        gone += channels[cheapest]
        left.remove(cheapest)
    return position


def naive_score(name: str, output, x, inputs) -> torch.Tensor:
    """One score per channel, written out for fp64 output [hidden, n], x [tokens, n] and feeding rows."""
    if name == "obs":
        return naive_obs(output, x)
    scores = []
    for j in range(output.shape[1]):
        column = output[:, j]
        if name == "magnitude":
            score = sum(w * w for w in column) ** 0.5
        elif name == "wanda-sp":
            score = sum(abs(w) for w in column) / len(column) * (sum(v * v for v in x[:, j]) / len(x)) ** 0.5
        elif name == "flap-wifv":
            mean = sum(x[:, j]) / len(x)
            score = sum((v - mean) ** 2 for v in x[:, j]) / len(x) * sum(w * w for w in column)
        elif name == "cfsp":
            norm = (sum(v * v for v in x[:, j]) / len(x)) ** 0.5
            parts = [
                (column * norm).abs() / sum((column * norm).abs()),
                *(m[j].abs() / sum(m[j].abs()) for m in inputs),
            ]
            score = sum(sum(parts) * norm) / len(column)
        else:
            score = sum(max(m[j]) + abs(min(m[j])) for m in inputs)
        scores.append(score)
    return torch.tensor(scores, dtype=torch.float64)


def statistics_of(x: torch.Tensor):
    x = x.double()
    return Statistics((x.T @ x / len(x)).float(), x.mean(0).float(), x.var(0, correction=0).float())


@pytest.mark.parametrize("name", RANKINGS)
def test_scores_equal_the_formula_written_out(name):
    generator = torch.Generator().manual_seed(0)
    output, x = torch.randn(7, 9, generator=generator), torch.randn(40, 9, generator=generator) + 0.5
    inputs = tuple(torch.randn(9, 7, generator=generator) for _ in range(2))
    expected = naive_score(name, output.double(), x.double(), [m.double() for m in inputs])
    found = ranking_named(name)(Scored(output, statistics_of(x), inputs))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def naive_layer(name: str, decoder: Decoder, index: int, statistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of a layer's kv-groups and of its channels, from the projections that transformers' modules hold."""
    layer = llama_like(decoder, index)
    s = decoder.structure
    ffn = ranking_named(name)(Scored(layer["down"], statistics.ffn, (layer["gate"], layer["up"])))
    # Query head h reads the values of kv-group h // g.
    columns = s.attention[index].columns
    heads = columns // s.head_dim
    rows = torch.cat(
        [layer["v"][h // heads * s.head_dim :][: s.head_dim] for h in range(s.attention[index].units * heads)]
    )
    channel = ranking_named(name)(Scored(layer["o"], statistics.attention, (rows,), columns))
    return torch.stack([part.sum() for part in channel.split(columns)]), ffn


def llama_like(decoder: Decoder, index: int) -> dict[str, torch.Tensor]:
    """A layer's projections by their names in Llama; Phi-3's are cut out of its fused ones."""
    layer, s = decoder.layers[index], decoder.structure
    if decoder.family.model_type != "phi3":
        found = {n: layer[f"self_attn.{n}_proj.weight"] for n in ("v", "o")}
        return found | {n: layer[f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down")}
    values = layer["self_attn.qkv_proj.weight"][-s.attention[index].units * s.head_dim :]
    gate, up = layer["mlp.gate_up_proj.weight"].chunk(2)
    down, o = layer["mlp.down_proj.weight"], layer["self_attn.o_proj.weight"]
    return {"v": values, "o": o, "gate": gate, "up": up, "down": down}


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize(("family", "heads"), [("llama", "mha"), ("llama", "gqa"), ("phi3", "gqa"), ("qwen2", "gqa")])
def test_layers_are_ranked_by_the_sums_over_their_units(name, family, heads):
    _, decoder = dense_weights(heads, family)
    statistics = list(calibrate(decoder, tokens(5, 30)))[1]
    ranking = rank_layer(name, decoder, 1, statistics)
    groups, channels = naive_layer(name, decoder, 1, statistics)
    scores = channels[ranking.ffn]
    assert (scores[1:] <= scores[:-1]).all()
    assert ranking.attention.tolist() == sorted(range(len(groups)), key=lambda g: -float(groups[g]))
    assert sorted(ranking.ffn.tolist()) == list(range(64))
    assert ranking.ffn.dtype == ranking.attention.dtype == torch.int64


@pytest.mark.parametrize("family", [f.model_type for f in families()])
def test_every_family_is_ranked(family):
    """Every unit once; where attention goes as a whole it stays in place, as norms over all heads ask."""
    _, decoder = dense_weights(family=family)
    for index, statistics in enumerate(calibrate(decoder, tokens(2, 24))):
        ranking = rank_layer("wanda-sp", decoder, index, statistics)
        assert sorted(ranking.ffn.tolist()) == list(range(64)) != ranking.ffn.tolist()
        assert sorted(ranking.attention.tolist()) == [0, 1, 2]
        assert not decoder.family.attention.whole or ranking.attention.tolist() == [0, 1, 2]


def test_layers_of_a_source_may_differ():
    """As many units as the layer has; none of what is absent."""
    policy = Policy([3, 0, 2, 1], [64, 16, 0, 40])
    decoder = Decoder.of_model(llama(pruned_config(config_of("qwen3"), policy)))
    for index, statistics in enumerate(calibrate(decoder, tokens(2, 24))):
        ranking = rank_layer("obs", decoder, index, statistics)
        assert sorted(ranking.attention.tolist()) == list(range(policy.attention[index]))
        assert sorted(ranking.ffn.tolist()) == list(range(policy.ffn[index]))
        assert ranking.attention.dtype == ranking.ffn.dtype == torch.int64


def test_ties_go_to_the_lower_index():
    _, decoder = dense_weights()
    down = torch.ones_like(decoder.output(0, "ffn"))
    down[:, 40] = 2
    equal = {"mlp.down_proj.weight": down, "self_attn.o_proj.weight": torch.ones_like(decoder.output(0, "attention"))}
    decoder = replace(decoder, layers=(dict(decoder.layers[0]) | equal, *decoder.layers[1:]))
    ranking = rank_layer("magnitude", decoder, 0, next(calibrate(decoder, tokens())))
    assert ranking.ffn.tolist() == [40, *range(40), *range(41, 64)]
    assert ranking.attention.tolist() == [0, 1, 2]


def test_rankings_disagree():
    _, decoder = dense_weights()
    statistics = list(calibrate(decoder, tokens()))[2]
    orders = {tuple(rank_layer(n, decoder, 2, statistics).ffn.tolist()) for n in RANKINGS}
    assert len(orders) == len(RANKINGS)


@pytest.mark.parametrize("unit", [1, 4])
def test_obs_removes_what_costs_least_after_refitting_the_others(unit):
    generator = torch.Generator().manual_seed(2)
    output, x = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (5, 60))
    x[:, 7] = x[:, 2] + 0.05 * x[:, 3]  # either may go, but not both:
    output[:, [2, 7]] = 3
    found = removal_scores(output, x.T @ x / len(x), unit)
    assert found.tolist() == naive_obs(output, x, unit).tolist()
    if unit == 1:
        assert min(found[2], found[7]) == 0 and max(found[2], found[7]) > 5
        # Negative control: in one round nothing is judged again, and both go early.
        assert max(removal_scores(output, x.T @ x / len(x), 1, rounds=1)[[2, 7]]) < 3


def test_obs_in_rounds_keeps_the_units_of_each_round_together():
    generator = torch.Generator().manual_seed(2)
    output, x = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (5, 60))
    coarse = removal_scores(output, x.T @ x / len(x), 1, rounds=5)  # 3, 3, 3, 3
    assert sorted(coarse.tolist()) == list(range(12))
    with pytest.raises(PPFError, match="NaN or Inf"):
        removal_scores(output, torch.full((12, 12), torch.nan), 1)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="magnitude, wanda-sp, flap-wifv, maw"):
        ranking_named("wanda")


def test_units_that_only_go_together_stay_where_they_are():
    """OLMo 2's norm over all heads has a weight for every place: heads that change places would be another model."""
    _, decoder = dense_weights(family="olmo2")
    for index, statistics in enumerate(calibrate(decoder, tokens(4, 24))):
        ranking = rank_layer("wanda-sp", decoder, index, statistics)
        assert ranking.attention.tolist() == [0, 1, 2] and ranking.ffn.tolist() != list(range(64))
