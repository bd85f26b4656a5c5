"""Masked evaluation against Hugging Face models that are dense, masked, or physically smaller."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from factories import config_of, dense_weights, llama, llama_config, model_of, random_ranking, tokens
from refit_cases import library_of, zeroed

from ppf.choose.candidates.sampling import mutate, random_levels
from ppf.errors import InputError
from ppf.families import families
from ppf.fast import batched
from ppf.fast.permute import identity, permuted
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.library import Library
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.layer import LayerRanking
from ppf.model.policy import Policy
from ppf.text import BATCH_TOKENS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:ppf. evaluation runs transformers' own layers"),
]
IDS = tokens(5, 24)  # longer than the windows, which are of 16 tokens
# Of the grouped-query model: dense, no attention, no FFN, neither; then partly both. Multi-head: twice the groups.
POLICIES = [Policy([3, 0, 2, 0], [64, 16, 0, 0]), Policy([1, 2, 3, 1], [8, 40, 24, 56]), Policy([1, 0, 0, 0], [0] * 4)]
ROPES = {
    "linear": {"factor": 3.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": 8, "short_factor": [1.0, 1.5, 2.0, 3.0],
        "long_factor": [2.0, 3.0, 4.0, 6.0],
    },
}  # fmt: skip
# Every family, Llama with what it may have, and sources whose layers differ: two sub-layers of each kind are left.
MODELS = {f.model_type: lambda f=f: model_of(f.model_type) for f in families()} | {
    "mha": lambda: model_of("llama", heads="mha"),
    "tied": lambda: model_of("llama", tie_word_embeddings=True),
    "biases": lambda: model_of("llama", attention_bias=True, mlp_bias=True),
    "half of a Llama": lambda: llama(pruned_config(llama_config(mlp_bias=True), POLICIES[0])),
    "half of a Gemma": lambda: llama(pruned_config(config_of("gemma3_text"), POLICIES[0])),
}


def policy_for(policy: Policy, grid: Grid) -> Policy:
    """``policy`` as far as a model can have it."""
    scale = grid.structure.attention[0].units / 3
    levels = grid.encode([grid.dense()])[0].tolist()
    wanted = [round(scale * w) // step for w, step in zip(policy.attention, grid.steps, strict=False)]
    wanted += [w // 8 for w in policy.ffn]
    kept = [max(low, min(w, top)) for w, low, top in zip(wanted, grid.minimum, levels, strict=True)]
    return grid.decode(torch.tensor([kept]))[0]


@torch.no_grad()
def hf_loss(model, ids=IDS) -> float:
    """Mean over all predicted tokens; the model's own loss, since all sequences are equally long."""
    return float(model.double()(ids, labels=ids).loss)


def evaluator(decoder: Decoder, ranking: list[LayerRanking], ids=IDS) -> Evaluator:
    return Evaluator(permuted(decoder, ranking), Grid(decoder.structure, 8), ids)


def plain(ids=IDS) -> Evaluator:
    """Of the grouped-query Llama, in a random ranking."""
    _, decoder = dense_weights()
    return evaluator(decoder, random_ranking(decoder.structure), ids)


@pytest.mark.parametrize("name", MODELS)
def test_dense_policy_has_the_models_loss(name):
    model = MODELS[name]()
    decoder = Decoder.of_model(model)
    ours = evaluator(decoder, random_ranking(decoder.structure))
    assert ours.log_perplexity(ours.grid.dense()) == pytest.approx(hf_loss(model), rel=1e-5)
    assert ours.tokens == IDS.numel()


@pytest.mark.parametrize("rope", ROPES)
def test_every_rotation_of_llama(rope):
    changes = {"head_dim": 8, "max_position_embeddings": 32 if rope in ("yarn", "longrope") else 16}
    rope = {"rope_type": rope, "rope_theta": 5e3} | ROPES[rope]
    model, decoder = dense_weights(rope_parameters=rope, **changes)
    ours, (_, other) = evaluator(decoder, random_ranking(decoder.structure)), dense_weights(head_dim=8)
    expected = hf_loss(model)
    assert ours.log_perplexity(ours.grid.dense()) == pytest.approx(expected, rel=1e-5)
    unscaled = evaluator(other, random_ranking(decoder.structure)).log_perplexity(ours.grid.dense())
    assert abs(unscaled - expected) > 1e-3  # the rotation matters


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", POLICIES)
def test_masked_policies_are_the_model_with_zeroed_columns(name, policy):
    model = MODELS[name]()
    decoder = Decoder.of_model(model)
    ranking = random_ranking(decoder.structure)
    ours = evaluator(decoder, ranking)
    policy = policy_for(policy, ours.grid)
    found, logits = ours.log_perplexity(policy), ours.logits(policy, IDS)
    with torch.no_grad():
        dense = model(IDS).logits
    reference = zeroed(model, ranking, policy)
    assert found == pytest.approx(hf_loss(reference), rel=1e-5)
    with torch.no_grad():
        expected = reference.float()(IDS).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (logits - dense).abs().max() > 1e-2 * dense.abs().max() or policy == ours.grid.dense()


def test_what_runs_by_transformers_layers_says_so_once():
    _, capped = dense_weights(family="gemma2")
    with pytest.warns(UserWarning, match="transformers' own layers.*score cap") as caught:
        evaluator(capped, identity(capped)).log_perplexities([Policy([3] * 4, [64] * 4), POLICIES[1]])
    assert len([warning for warning in caught if "transformers' own layers" in str(warning.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain().log_perplexity(POLICIES[1])


def test_one_swapped_unit_shows():
    _, decoder = dense_weights()
    ranking, policy = random_ranking(decoder.structure), POLICIES[1]
    reference = evaluator(decoder, ranking).logits(policy, IDS)
    order = ranking[1].ffn.clone()
    order[[0, 63]] = order[[63, 0]]  # a kept unit for a pruned one, in one layer
    swapped = [replace(r, ffn=order) if index == 1 else r for index, r in enumerate(ranking)]
    wrong = evaluator(decoder, swapped).logits(policy, IDS)
    assert (wrong - reference).abs().max() > 1e-3 * reference.abs().max()
    within = ranking[1].ffn.clone()
    within[[0, 39]] = within[[39, 0]]  # both kept: the same selection
    same = [replace(r, ffn=within) if index == 1 else r for index, r in enumerate(ranking)]
    torch.testing.assert_close(evaluator(decoder, same).logits(policy, IDS), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("size", [1, 50, 10**6])
def test_batches_make_no_difference(monkeypatch, family, size):
    """Fused or by transformers' layers, whose masks are those of a batch."""
    _, decoder = dense_weights(family=family)
    ours = evaluator(decoder, random_ranking(decoder.structure))
    expected = ours.log_perplexity(POLICIES[1])
    monkeypatch.setitem(BATCH_TOKENS, "cpu", size)
    ours = evaluator(decoder, random_ranking(decoder.structure))
    assert ours.log_perplexity(POLICIES[1]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_close(family, dtype):
    model = model_of(family, dtype=dtype)
    decoder = Decoder.of_model(model)
    found = evaluator(decoder, random_ranking(decoder.structure)).log_perplexity(POLICIES[1])
    expected = hf_loss(zeroed(model, random_ranking(decoder.structure), POLICIES[1]))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_model_and_its_text_stay_untouched(family):
    model, decoder = dense_weights(family=family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = evaluator(decoder, random_ranking(decoder.structure))
    first = [ours.log_perplexity(p) for p in POLICIES]
    assert [ours.log_perplexity(p) for p in POLICIES] == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nan_weights_are_not_hidden():
    model, decoder = dense_weights()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    assert math.isnan(evaluator(decoder, random_ranking(decoder.structure)).log_perplexity(Policy([3] * 4, [64] * 4)))


def population(grid: Grid, count: int = 12) -> list[Policy]:
    """Random policies, neighbours that begin like them, the dense one, and one twice."""
    generator = torch.Generator().manual_seed(5)
    parents = random_levels(grid, torch.linspace(0.1, 0.6, count // 3), generator)
    mutants = mutate(parents.repeat(2, 1), grid, generator, swaps=1)
    late = torch.tensor([grid.maximum] * 2)
    late[0, grid.structure.layers - 1] -= 1  # pruned in the last layer only
    late[1, -1] -= 1
    return [*grid.decode(torch.cat((parents, mutants, late))), grid.dense(), grid.decode(parents[:1])[0]]


@pytest.mark.parametrize("name", ["llama", "gemma2", "half of a Llama"])
@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_policies_do_not_depend_on_their_company(monkeypatch, name, limit):
    monkeypatch.setattr("ppf.fast.layer_major._DENSE_BYTES", limit)
    decoder = Decoder.of_model(MODELS[name]())

    def fresh() -> Evaluator:
        return evaluator(decoder, random_ranking(decoder.structure))

    ours = fresh()
    policies = population(ours.grid) if name == "llama" else ours.grid.decode(
        random_levels(ours.grid, torch.linspace(0.1, 0.6, 5), torch.Generator().manual_seed(5))
    )  # fmt: skip
    alone = [fresh().log_perplexity(p) for p in policies]
    assert ours.log_perplexities(policies) == alone == ours.log_perplexities(policies)
    assert ours.log_perplexities([]) == [] and len(set(alone)) > 4


def test_fewer_tokens_are_a_part_of_the_text():
    ours, part = plain(), plain(IDS[[0, 2]])  # evenly spread
    assert ours.log_perplexities(POLICIES, tokens=50) == part.log_perplexities(POLICIES)
    assert ours.log_perplexity(POLICIES[1], tokens=10**9) == ours.log_perplexity(POLICIES[1])
    with pytest.raises(InputError, match="tokens"):
        ours.log_perplexities(POLICIES, tokens=0)


def test_policies_off_the_grid_are_refused():
    for call in (plain().log_perplexity, lambda policy: plain().logits(policy, IDS)):
        with pytest.raises(InputError, match="off the grid"):
            call(Policy([3] * 4, [63] * 4))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engines_agree_on_a_gpu(family, refit, dtype):
    """fp32 and odd sizes take the serial engine, 16-bit powers of two the batched one; both against fp32 on the CPU."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    _, exact = dense_weights(family=family, **(sizes if dtype == torch.bfloat16 else {}))
    grid, ranking = Grid(exact.structure, 8), random_ranking(exact.structure)
    library = library_of(exact, ranking, grid, tokens(8, 40)) if refit else None
    exact, policies = permuted(exact, ranking), population(grid)
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


def to_cuda(decoder: Decoder) -> Decoder:
    layers = tuple({name: tensor.cuda() for name, tensor in layer.items()} for layer in decoder.layers)
    return replace(decoder, layers=layers, outer={name: tensor.cuda() for name, tensor in decoder.outer.items()})


def library_to_cuda(library: Library, dtype: torch.dtype) -> Library:
    factors = [{name: tensor.cuda() for name, tensor in layer.items()} for layer in library._factors]
    return Library(to_cuda(library.decoder), library.grid, factors, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_cuda_agrees_with_the_cpu(name):
    decoder = Decoder.of_model(MODELS[name]())
    ranking = random_ranking(decoder.structure)
    on_cpu, on_gpu = evaluator(decoder, ranking), evaluator(to_cuda(decoder), ranking)
    for policy in POLICIES:
        policy = policy_for(policy, on_cpu.grid)
        assert on_gpu.log_perplexity(policy) == pytest.approx(on_cpu.log_perplexity(policy), rel=1e-4)
