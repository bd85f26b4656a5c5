"""Masked evaluation against Hugging Face models that are dense, masked, or physically smaller."""

import copy
import math
from dataclasses import fields, replace

import pytest
import torch
from factories import dense_weights, llama, llama_config, random_ranking, tokens

from ppf.choose.candidates.sampling import mutate, random_levels
from ppf.errors import InputError
from ppf.fast import batched
from ppf.fast.plan import executed, order, shared, walk
from ppf.fitting.calibration import calibrate
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.evaluation.divergence import Divergences
from ppf.fitting.evaluation.serial import Serial
from ppf.fitting.evaluation.staged import survivors
from ppf.fitting.library import Library, refit_layer
from ppf.model.grid import Grid
from ppf.model.policy import Policy
from ppf.model.weights import DecoderWeights, LayerRanking, expand_units
from ppf.text import BATCH_TOKENS

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = tokens(5, 24)
# Of the grouped-query model: dense, no attention, no FFN, neither; then partly both. Multi-head: twice the groups.
POLICIES = [Policy([3, 0, 2, 0], [64, 16, 0, 0]), Policy([1, 2, 3, 1], [8, 40, 24, 56]), Policy([1, 0, 0, 0], [0] * 4)]


def policy_for(policy: Policy, heads: str) -> Policy:
    return policy if heads == "gqa" else Policy([2 * w for w in policy.attention], policy.ffn)


def masked(model, ranking: list[LayerRanking], policy: Policy):
    """The dense model with the columns of all pruned units set to zero, in place."""
    size = model.config.head_dim * (model.config.num_attention_heads // model.config.num_key_value_heads)
    for index, (layer, ranked) in enumerate(zip(model.model.layers, ranking, strict=True)):
        lost = expand_units(ranked.attention[policy.attention[index] :], size)
        layer.self_attn.o_proj.weight.data[:, lost] = 0
        layer.mlp.down_proj.weight.data[:, ranked.ffn[policy.ffn[index] :]] = 0
    return model


@torch.no_grad()
def hf_loss(model, ids=IDS) -> float:
    """Mean over all predicted tokens; the model's own loss, since all sequences are equally long."""
    return float(model.double()(ids, labels=ids).loss)


def evaluator(weights: DecoderWeights, ranking: list[LayerRanking], ids=IDS) -> Evaluator:
    return Evaluator(weights.permuted(ranking), Grid(weights.structure, 8), ids)


@pytest.mark.parametrize("heads", ["mha", "gqa"])
@pytest.mark.parametrize("tied", [False, True])
def test_dense_policy_has_the_models_loss(heads, tied):
    model, weights = dense_weights(heads, tie_word_embeddings=tied)
    ours = evaluator(weights, random_ranking(weights.structure))
    assert ours.log_perplexity(ours.grid.dense()) == pytest.approx(hf_loss(model), rel=1e-5)
    assert ours.tokens == IDS.numel()


def test_scaled_rotary_embeddings_as_in_llama_3():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model, weights = dense_weights(rope_parameters=rope | {"original_max_position_embeddings": 64}, head_dim=24)
    ours, (_, plain) = evaluator(weights, random_ranking(weights.structure)), dense_weights(head_dim=24)
    expected = hf_loss(model)
    assert ours.log_perplexity(ours.grid.dense()) == pytest.approx(expected, rel=1e-5)
    other = evaluator(plain, random_ranking(weights.structure)).log_perplexity(ours.grid.dense())
    assert abs(other - expected) > 1e-3  # the scaling matters


@pytest.mark.parametrize("heads", ["mha", "gqa"])
@pytest.mark.parametrize("policy", POLICIES)
def test_masked_policies_are_the_model_with_zeroed_columns(heads, policy):
    model, weights = dense_weights(heads)
    ranking, policy = random_ranking(weights.structure), policy_for(policy, heads)
    ours = evaluator(weights, ranking)
    found, logits = ours.log_perplexity(policy), ours.logits(policy, IDS)
    dense = hf_loss(llama(llama_config(heads)))
    reference = masked(llama(llama_config(heads)), ranking, policy)
    assert found == pytest.approx(hf_loss(reference), rel=1e-5) and abs(found - dense) > 1e-2
    with torch.no_grad():
        expected = reference.float()(IDS).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_one_swapped_unit_shows():
    _, weights = dense_weights()
    ranking, policy = random_ranking(weights.structure), POLICIES[1]
    reference = evaluator(weights, ranking).logits(policy, IDS)
    order = ranking[1].ffn.clone()
    order[[0, 63]] = order[[63, 0]]  # a kept unit for a pruned one, in one layer
    swapped = [replace(r, ffn=order) if index == 1 else r for index, r in enumerate(ranking)]
    wrong = evaluator(weights, swapped).logits(policy, IDS)
    assert (wrong - reference).abs().max() > 1e-3 * reference.abs().max()
    within = ranking[1].ffn.clone()
    within[[0, 39]] = within[[39, 0]]  # both kept: the same selection
    same = [replace(r, ffn=within) if index == 1 else r for index, r in enumerate(ranking)]
    torch.testing.assert_close(evaluator(weights, same).logits(policy, IDS), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 50, 10**6])
def test_batches_make_no_difference(monkeypatch, size):
    _, weights = dense_weights()
    ours = evaluator(weights, random_ranking(weights.structure))
    expected = ours.log_perplexity(POLICIES[1])
    monkeypatch.setitem(BATCH_TOKENS, "cpu", size)
    assert ours.log_perplexity(POLICIES[1]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    model = llama(llama_config(), dtype=dtype)
    weights = DecoderWeights.from_model(model)
    found = evaluator(weights, random_ranking(weights.structure)).log_perplexity(POLICIES[1])
    expected = hf_loss(masked(model, random_ranking(weights.structure), POLICIES[1]))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    assert found == pytest.approx(expected, rel=tolerance)


def test_the_model_and_its_text_stay_untouched():
    model, weights = dense_weights()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = evaluator(weights, random_ranking(weights.structure))
    first = [ours.log_perplexity(p) for p in POLICIES]
    assert [ours.log_perplexity(p) for p in POLICIES] == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nan_weights_are_not_hidden():
    model, weights = dense_weights()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    assert math.isnan(evaluator(weights, random_ranking(weights.structure)).log_perplexity(Policy([3] * 4, [64] * 4)))


def population(grid: Grid, count: int = 12) -> list[Policy]:
    """Random policies, neighbours that begin like them, the dense one, and one twice."""
    generator = torch.Generator().manual_seed(5)
    parents = random_levels(grid, torch.linspace(0.1, 0.6, count // 3), generator)
    mutants = mutate(parents.repeat(2, 1), grid, generator, swaps=1)
    late = torch.tensor([grid.maximum] * 2)
    late[0, grid.structure.layers - 1] -= 1  # pruned in the last layer only
    late[1, -1] -= 1
    return [*grid.decode(torch.cat((parents, mutants, late))), grid.dense(), grid.decode(parents[:1])[0]]


def test_walks_start_where_an_earlier_policy_was_left():
    _, weights = dense_weights()
    grid = Grid(weights.structure, 8)
    levels = [executed(row) for row in grid.encode(population(grid)).tolist()]
    dense, held = executed(grid.maximum), {}
    steps = walk(levels, dense)
    assert sorted(step.index for step in steps) == list(range(len(levels)))
    for at, step in enumerate(steps):
        row = levels[step.index]
        held = {depth: prefix for depth, prefix in held.items() if depth <= step.start}
        assert held.get(step.start, dense[: step.start]) == row[: step.start]
        if at:  # as deep as with the policy before: the deepest there is, in sorted order
            assert step.start == max(shared(row, levels[other.index]) for other in steps[:at])
        held |= {depth: row[:depth] for depth in step.keep}
    assert sum(step.start for step in steps) > 0.2 * len(levels) * len(dense)
    assert order([[1, 2], [3, 0], [1, 3]]) == [1, 2, 0] and walk([], dense) == []


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_policies_do_not_depend_on_their_company(monkeypatch, limit):
    monkeypatch.setattr("ppf.fitting.evaluation.serial._DENSE_BYTES", limit)
    _, weights = dense_weights()
    ours = evaluator(weights, random_ranking(weights.structure))
    policies = population(ours.grid)
    alone = [evaluator(weights, random_ranking(weights.structure)).log_perplexity(p) for p in policies]
    assert ours.log_perplexities(policies) == alone == ours.log_perplexities(policies)
    assert ours.log_perplexities([]) == []


def test_fewer_tokens_are_a_part_of_the_text():
    _, weights = dense_weights()
    ours = evaluator(weights, random_ranking(weights.structure))
    part = evaluator(weights, random_ranking(weights.structure), IDS[[0, 2]])  # evenly spread
    assert ours.log_perplexities(POLICIES, tokens=50) == part.log_perplexities(POLICIES)
    assert ours.log_perplexity(POLICIES[1], tokens=10**9) == ours.log_perplexity(POLICIES[1])
    with pytest.raises(InputError, match="tokens"):
        ours.log_perplexities(POLICIES, tokens=0)


def test_stages_reject_early_and_keep_the_best():
    _, weights = dense_weights()
    ours = evaluator(weights, random_ranking(weights.structure), tokens(8, 24))
    policies, seen = population(ours.grid), []
    plain = ours.log_perplexities
    ours.log_perplexities = lambda these, count=None: (seen.append((len(these), count)), plain(these, count))[1]
    found = survivors(ours, policies, ((48, 6), (96, 3), (None, 2)))
    assert seen == [(15, 48), (6, 96), (3, None)]  # one of the sixteen came twice
    first = dict(zip(policies, plain(policies, 48), strict=True))
    second = sorted(sorted(first, key=first.get)[:6], key=lambda p: plain([p], 96)[0])[:3]
    assert found == sorted(((p, plain([p])[0]) for p in second), key=lambda pair: pair[1])[:2]
    seen.clear()  # a text shorter than the stages is measured once
    assert survivors(ours, policies)[0][1] == min(plain(policies)) and len(seen) == 1
    with pytest.raises(InputError, match="stages"):
        survivors(ours, policies, ((None, 0),))


def exact_divergences(ours: Evaluator, policies: list[Policy]) -> list[float]:
    """With whole distributions, in fp64."""

    def distribution(policy: Policy) -> torch.Tensor:
        return ours.logits(policy, IDS)[:, :-1].double().log_softmax(-1)

    dense = distribution(ours.grid.dense())
    return [float((dense.exp() * (dense - distribution(p))).sum(-1).mean()) for p in policies]


@pytest.mark.parametrize("make", [Serial, batched.Batched])
def test_divergences_are_those_of_the_whole_distributions(make):
    _, weights = dense_weights()
    ours = evaluator(weights, random_ranking(weights.structure))
    policies = population(ours.grid)
    if make is batched.Batched:
        engine = batched.Batched(ours.weights, ours.grid, batched.prepare(ours.weights, ours.grid, None), IDS)
    else:
        engine = Serial(ours.weights, ours.grid, IDS, None)
    levels = [executed(row) for row in ours.grid.encode(policies).tolist()]
    expected = exact_divergences(ours, policies)
    whole = Divergences(engine, ours.weights, ours.grid, top=10**6).means(levels)
    assert whole.tolist() == pytest.approx(expected, rel=2e-3, abs=2e-3)  # kept in fp16
    few = Divergences(engine, ours.weights, ours.grid).means(levels)  # 64 of 258 tokens of a flat distribution
    assert (few <= whole + 1e-3).all() and (few > 0.6 * whole - 1e-3).all()
    assert ours.divergences(policies) == pytest.approx(few.tolist(), rel=1e-3, abs=1e-5)
    assert abs(expected[-2]) < 1e-9 and max(expected) > 1  # the dense policy's own is none
    assert ours.divergences([]) == []


@pytest.mark.parametrize("heads", ["mha", "gqa"])
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("members", [1, 3, 64])
def test_batched_is_serial(heads, refit, members):
    """The batched engine on the ops' references, exact up to rounding."""
    _, weights = dense_weights(heads)
    grid = Grid(weights.structure, 8)
    weights = weights.permuted(random_ranking(weights.structure))
    library = library_of(weights, grid) if refit else None
    engine = batched.Batched(weights, grid, batched.prepare(weights, grid, library), IDS)
    engine.members = members
    levels = [executed(row) for row in grid.encode(population(grid)).tolist()]
    expected = Serial(weights, grid, IDS, library).losses(levels)
    torch.testing.assert_close(engine.losses(levels), expected, rtol=1e-5, atol=0)
    assert expected.unique().numel() > 10


def library_of(weights: DecoderWeights, grid: Grid) -> Library:
    """Refits for weights that stand in ranking order already."""
    same = [LayerRanking(torch.arange(grid.structure.kv_groups), torch.arange(grid.structure.channels))]
    statistics = calibrate(weights, tokens(8, 40))
    refits = [refit_layer(w, s, same[0], grid) for w, s in zip(weights.layers, statistics, strict=True)]
    return Library([attention for attention, _ in refits] + [ffn for _, ffn in refits])


@pytest.mark.gpu
@pytest.mark.parametrize("heads", ["mha", "gqa"])
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engines_agree_on_a_gpu(heads, refit, dtype):
    """fp32 and odd sizes take the serial engine, 16-bit powers of two the batched one; both against fp32 on the CPU."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4 if heads == "mha" else 2}
    changes = sizes if dtype == torch.bfloat16 else {}
    _, exact = dense_weights(heads, **changes)
    grid = Grid(exact.structure, 8)
    exact = exact.permuted(random_ranking(exact.structure))
    library = library_of(exact, grid) if refit else None
    policies = population(grid)
    expected = Evaluator(exact, grid, IDS, library).log_perplexities(policies)
    on_gpu = to_cuda(exact.to(dtype))
    ours = Evaluator(on_gpu, grid, IDS, library_to_cuda(library, dtype) if refit else None)
    found = ours.log_perplexities(policies)
    assert batched.applies(on_gpu) == (dtype == torch.bfloat16)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    assert found == pytest.approx(expected, rel=tolerance)
    assert [ours.log_perplexity(p) for p in policies] == found  # bit for bit, alone or in company
    shuffled = policies[::-1]
    assert ours.log_perplexities(shuffled) == found[::-1]


def to_cuda(weights: DecoderWeights) -> DecoderWeights:
    layers = tuple(
        replace(layer, **{f.name: getattr(layer, f.name).cuda() for f in fields(layer)}) for layer in weights.layers
    )
    moved = {name: getattr(weights, name).cuda() for name in ("embedding", "norm", "head")}
    return replace(weights, layers=layers, rotary=copy.deepcopy(weights.rotary).cuda(), **moved)


def library_to_cuda(library: Library, dtype: torch.dtype) -> Library:
    moved = [replace(r, dense=r.dense.cuda(), half=r.half.cuda(), inverse=r.inverse.cuda()) for r in library._refits]
    return Library(moved, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_cuda_agrees_with_the_cpu(heads):
    model, weights = dense_weights(heads)
    ranking = random_ranking(weights.structure)
    on_cpu = evaluator(weights, ranking)
    on_gpu = evaluator(DecoderWeights.from_model(llama(llama_config(heads)).cuda()), ranking)
    for policy in POLICIES:
        policy = policy_for(policy, heads)
        assert on_gpu.log_perplexity(policy) == pytest.approx(on_cpu.log_perplexity(policy), rel=1e-4)
