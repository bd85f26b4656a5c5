"""Materialised models compute what masked evaluation said, here and in a new process."""

import json
import subprocess
import sys

import pytest
import torch
from factories import TINY, byte_tokenizer, llama, llama_config, random_ranking, tokens
from transformers import LlamaForCausalLM, MistralForCausalLM

from ppf.checkpoint import load_dense, load_tokenizer, save
from ppf.choose.candidates.sampling import uniform_policy
from ppf.errors import InputError
from ppf.fitting.calibration import calibrate
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.library import Library, refit_layer
from ppf.fitting.materialise import materialize
from ppf.fitting.ranking import rank_layer
from ppf.model import PPFLlamaForCausalLM, policy_of
from ppf.model.grid import Grid
from ppf.model.policy import Policy
from ppf.model.weights import DecoderWeights, permute_layer
from ppf.text import pack, read_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = tokens(4, 24, seed=5)
POLICY = {"gqa": Policy([3, 0, 2, 1], [64, 16, 0, 40]), "mha": Policy([6, 0, 5, 1], [64, 16, 0, 40])}
NEITHER = Policy([1, 0, 2, 0], [8, 0, 0, 64])  # layer 1 is gone altogether


class Case:
    """A random model with a random ranking and the library of its calibration."""

    def __init__(self, heads: str = "gqa", dtype: torch.dtype = torch.float32, device: str = "cpu", **changes):
        self.config = llama_config(heads, **changes)
        self.dense = llama(self.config, dtype=dtype).to(device)
        self.weights = DecoderWeights.from_model(self.dense)
        self.grid = Grid(self.weights.structure, 8)
        self.ranking = random_ranking(self.weights.structure)
        refits = []
        for index, statistics in enumerate(calibrate(self.weights, tokens(8, 40))):
            layer = permute_layer(self.weights.layers[index], self.ranking[index], self.weights.structure)
            refits.append(refit_layer(layer, statistics, self.ranking[index], self.grid))
        self.library = Library([a for a, _ in refits] + [f for _, f in refits])

    def evaluator(self, refit: bool = True) -> Evaluator:
        library = self.library if refit else None
        return Evaluator(self.weights.permuted(self.ranking), self.grid, IDS, library)

    def model(self, policy: Policy, refit: bool = True):
        library = self.library if refit else None
        return materialize(self.config, self.weights, self.ranking, self.grid, policy, library)


@torch.no_grad()
def agree(model, evaluator: Evaluator, policy: Policy, tolerance: float) -> bool:
    """Whether the largest difference in logits is within ``tolerance`` of the largest logit."""
    ids = IDS.to(model.device)
    logits = model(ids).logits.float()
    return float((logits - evaluator.logits(policy, ids)).abs().max() / logits.abs().max()) <= tolerance


def loss(model) -> float:
    ids = IDS.to(model.device)
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


@pytest.mark.parametrize("heads", ["mha", "gqa"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("refit", [False, True])
def test_logits_equal_masked_evaluation(heads, tied, refit):
    case, policy = Case(heads, tie_word_embeddings=tied), POLICY[heads]
    model, evaluator = case.model(policy, refit), case.evaluator(refit)
    assert type(model) is PPFLlamaForCausalLM and policy_of(model.config) == policy
    assert agree(model, evaluator, policy, 1e-4)
    assert loss(model) == pytest.approx(evaluator.log_perplexity(policy), rel=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    # Negative control: one kept channel exchanged for another in one layer.
    gate = model.model.layers[1].mlp.gate_proj.weight.data
    gate[[0, 1]] = gate[[1, 0]]
    assert not agree(model, evaluator, policy, 1e-3)


def test_a_trained_model_in_bf16_within_half_a_percent_and_better_than_masking():
    dense, tokenizer = load_dense(TINY), load_tokenizer(TINY)
    sequences = pack(read_tokens(TINY.parent / "sample.txt", tokenizer), 256)
    weights = DecoderWeights.from_model(dense)
    exact, grid, ranking, refits = weights.to(torch.float32), Grid(weights.structure, 64), [], []
    for layer, statistics in zip(weights.layers, calibrate(exact, sequences[:24]), strict=True):
        ranking.append(rank_layer("wanda-sp", layer, statistics, weights.structure))
        permuted = permute_layer(layer, ranking[-1], weights.structure)
        refits.append(refit_layer(permuted, statistics, ranking[-1], grid))
    library = Library([a for a, _ in refits] + [f for _, f in refits])
    held_out = sequences[-8:]
    refitted = Evaluator(exact.permuted(ranking), grid, held_out, library.to(torch.float32))
    masked = Evaluator(exact.permuted(ranking), grid, held_out)
    for policy in (uniform_policy(grid, 0.3), Policy([2, 1, 2, 0, 1, 2, 1, 2], [384, 64, 0, 128, 192, 256, 384, 320])):
        model = materialize(dense.config, weights, ranking, grid, policy, library)
        assert model.dtype == torch.bfloat16
        with torch.no_grad():
            measured = float(torch.stack([model(ids[None], labels=ids[None]).loss for ids in held_out]).double().mean())
        assert measured == pytest.approx(refitted.log_perplexity(policy), abs=0.005)
        assert refitted.log_perplexity(policy) < masked.log_perplexity(policy) - 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", [POLICY["gqa"], NEITHER])
def test_every_dtype_and_absent_sublayers(dtype, policy):
    case = Case(dtype=dtype)
    model = case.model(policy)
    assert model.dtype == dtype and {p.dtype for p in model.parameters()} == {dtype}
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert agree(model, case.evaluator(), policy, tolerance)
    assert loss(model.float()) == pytest.approx(
        case.evaluator().log_perplexity(policy), abs=0.005 if dtype is torch.float32 else 0.03
    )


def test_the_dense_policy_is_the_dense_model_bit_for_bit_up_to_order():
    case = Case()
    model = case.model(case.grid.dense())
    assert type(model) is LlamaForCausalLM
    for index, (old, new) in enumerate(zip(case.dense.model.layers, model.model.layers, strict=True)):
        order = case.ranking[index].ffn
        assert torch.equal(new.mlp.gate_proj.weight, old.mlp.gate_proj.weight[order])
        assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, order])
    assert agree(model, case.evaluator(), case.grid.dense(), 1e-4)


def test_uniform_policies_become_stock_classes():
    case = Case("gqa")
    llama_like = case.model(Policy([1] * 4, [40] * 4))  # 2 heads divide 48
    assert type(llama_like) is LlamaForCausalLM and agree(llama_like, case.evaluator(), Policy([1] * 4, [40] * 4), 1e-4)
    case = Case("mha")
    mistral = case.model(Policy([5] * 4, [40] * 4))  # 5 heads do not
    assert type(mistral) is MistralForCausalLM and agree(mistral, case.evaluator(), Policy([5] * 4, [40] * 4), 1e-4)


def test_the_result_owns_its_weights():
    case, policy = Case(), POLICY["gqa"]
    model = case.model(policy)
    before = case.evaluator().log_perplexity(policy)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert case.evaluator().log_perplexity(policy) == before


def test_the_result_is_as_small_as_the_policy_says():
    case, policy = Case(), POLICY["gqa"]
    names = ("_proj.",)
    kept = sum(p.numel() for n, p in case.model(policy).named_parameters() if any(name in n for name in names))
    assert kept == int(case.grid.kept(case.grid.encode([policy]))[0])


def test_policies_off_the_grid_are_refused():
    with pytest.raises(InputError, match="off the grid"):
        Case().model(Policy([3, 0, 2, 1], [64, 17, 0, 40]))


_RELOAD = """
import json, sys
import torch
import ppf
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[1]))
for path in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        out = model(ids, labels=ids)
    print(json.dumps({"type": type(model).__name__, "dtype": str(model.dtype), "loss": float(out.loss),
                      "logits": out.logits[0].float().tolist()}))
"""
# The last one is uniform: stock Mistral.
_RELOADED = [
    ("gqa", True, torch.bfloat16, POLICY["gqa"]),
    ("mha", False, torch.float32, POLICY["mha"]),
    ("gqa", True, torch.float32, NEITHER),
    ("mha", False, torch.float32, Policy([5] * 4, [40] * 4)),
]


def test_reloaded_in_a_new_process(tmp_path):
    cases = [Case(heads, dtype, tie_word_embeddings=tied) for heads, tied, dtype, _ in _RELOADED]
    models = [case.model(policy) for case, (*_, policy) in zip(cases, _RELOADED, strict=True)]
    folders = [str(tmp_path / str(index)) for index in range(len(models))]
    for model, folder in zip(models, folders, strict=True):
        save(model, byte_tokenizer(), folder, {})
    command = [sys.executable, "-c", _RELOAD, json.dumps(IDS.tolist()), *folders]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    for found, case, model, (_, _, dtype, policy) in zip(lines, cases, models, _RELOADED, strict=True):
        assert found["type"] == type(model).__name__ and found["dtype"] == str(dtype)
        with torch.no_grad():
            expected = model(IDS).logits[0].float()
        assert (torch.tensor(found["logits"]) - expected).abs().max() <= 1e-4 * expected.abs().max()
        # 0.5 % in perplexity; bf16 rounds a random model's logits more than a trained one's.
        tolerance = 0.005 if dtype is torch.float32 else 0.02
        assert found["loss"] == pytest.approx(case.evaluator().log_perplexity(policy), abs=tolerance)
    assert [line["type"] for line in lines] == ["PPFLlamaForCausalLM"] * 3 + ["MistralForCausalLM"]


@pytest.mark.gpu
def test_cuda_result_equals_the_cpus():
    on_cpu, on_gpu = Case(), Case(device="cuda")
    model = on_gpu.model(POLICY["gqa"])
    assert model.device.type == "cuda" and agree(model, on_gpu.evaluator(), POLICY["gqa"], 1e-4)
    assert loss(model) == pytest.approx(loss(on_cpu.model(POLICY["gqa"])), rel=1e-3)
