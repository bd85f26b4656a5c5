"""Materialised models compute what masked evaluation said, here and in a new process."""

import json

import fresh
import pytest
import torch
from factories import TINY, byte_tokenizer, config_of, llama, llama_config, random_ranking, tokens
from refit_cases import library_of
from transformers import LlamaForCausalLM, MistralForCausalLM

from ppf.checkpoint import load, load_tokenizer, save
from ppf.choose.candidates.sampling import uniform_policy
from ppf.errors import InputError
from ppf.families import families, family_of
from ppf.fast.permute import permuted
from ppf.fitting.calibration import calibrate
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.materialize import materialize
from ppf.fitting.ranking import rank_layer
from ppf.model.build import policy_of, pruned_config
from ppf.model.classes import result_classes, stock_classes
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy
from ppf.text import pack, read_tokens

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:ppf. evaluation runs transformers' own layers"),
]
IDS = tokens(4, 24, seed=5)
POLICY = {"gqa": Policy([3, 0, 2, 1], [64, 16, 0, 40]), "mha": Policy([6, 0, 5, 1], [64, 16, 0, 40])}
WHOLE = Policy([3, 0, 3, 3], [64, 16, 0, 40])
NEITHER = Policy([1, 0, 2, 0], [8, 0, 0, 64])  # layer 1 is gone altogether
SOURCE, AGAIN = Policy([3, 0, 2, 3], [64, 64, 0, 48]), Policy([2, 0, 2, 0], [48, 8, 0, 40])


class Case:
    """A random model with a random ranking and the library of its calibration."""

    def __init__(self, config=None, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        self.dense = llama(config or llama_config(), dtype=dtype).to(device)
        self.decoder = Decoder.of_model(self.dense)
        self.grid = Grid(self.decoder.structure, 8)
        self.ranking = random_ranking(self.decoder.structure)
        self.library = library_of(self.decoder, self.ranking, self.grid, tokens(8, 40))

    def evaluator(self, refit: bool = True) -> Evaluator:
        return Evaluator(permuted(self.decoder, self.ranking), self.grid, IDS, self.library if refit else None)

    def model(self, policy: Policy, refit: bool = True):
        return materialize(self.decoder, self.ranking, self.grid, policy, self.library if refit else None)


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


def spoil(model) -> None:
    """Exchange two kept channels of one layer in what feeds them, and not in what they feed."""
    rows = next(p for n, p in model.named_parameters() if "layers.3.mlp.gate" in n).data
    rows[[0, 1]] = rows[[1, 0]]


# Configuration and policy; every family, Llama with and without biases, and sources whose layers differ.
CASES = {f.model_type: (config_of(f.model_type), POLICY["gqa"]) for f in families()} | {
    "olmo2": (config_of("olmo2"), WHOLE),
    "mha": (llama_config("mha"), POLICY["mha"]),
    "tied": (llama_config(tie_word_embeddings=True), POLICY["gqa"]),
    "biases": (llama_config(attention_bias=True, mlp_bias=True), POLICY["gqa"]),
    "half of a Llama": (pruned_config(llama_config(attention_bias=True), SOURCE), AGAIN),
    "half of a Qwen2": (pruned_config(config_of("qwen2"), SOURCE), AGAIN),
    "half of a Phi-3": (pruned_config(config_of("phi3"), SOURCE), AGAIN),
    "half of a Gemma": (pruned_config(config_of("gemma3_text"), SOURCE), AGAIN),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("refit", [False, True])
def test_logits_equal_masked_evaluation(name, refit):
    config, policy = CASES[name]
    case = Case(config)
    model, evaluator = case.model(policy, refit), case.evaluator(refit)
    assert type(model) is result_classes(family_of(config.model_type))["ForCausalLM"]
    assert policy_of(model.config) == policy
    assert agree(model, evaluator, policy, 1e-4)
    assert loss(model) == pytest.approx(evaluator.log_perplexity(policy), rel=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tied")
    spoil(model)  # negative control
    assert not agree(model, evaluator, policy, 1e-3)


def test_a_trained_model_in_bf16_within_half_a_percent_and_better_than_masking():
    dense, tokenizer = load(TINY), load_tokenizer(TINY)
    sequences = pack(read_tokens(TINY.parent / "sample.txt", tokenizer), 256)
    decoder = Decoder.of_model(dense)
    exact, grid = decoder.to(torch.float32), Grid(decoder.structure, 64)
    statistics = list(calibrate(exact, sequences[:24]))
    ranking = [rank_layer("wanda-sp", decoder, index, found) for index, found in enumerate(statistics)]
    library, held_out = library_of(decoder, ranking, grid, sequences[:24]), sequences[-8:]
    refitted = Evaluator(permuted(exact, ranking), grid, held_out, library.to(torch.float32))
    masked = Evaluator(permuted(exact, ranking), grid, held_out)
    for policy in (uniform_policy(grid, 0.3), Policy([2, 1, 2, 0, 1, 2, 1, 2], [384, 64, 0, 128, 192, 256, 384, 320])):
        model = materialize(decoder, ranking, grid, policy, library)
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
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.08, torch.float16: 0.01}[dtype]
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


@pytest.mark.parametrize("family", [f.model_type for f in families()])
def test_uniform_policies_become_stock_classes(family):
    policy = Policy([3 if family == "olmo2" else 1] * 4, [40] * 4)  # 2 heads divide 48
    case = Case(config_of(family))
    model = case.model(policy)
    assert type(model) is stock_classes(family_of(family))["ForCausalLM"]
    assert agree(model, case.evaluator(), policy, 1e-4)


def test_head_counts_that_llama_refuses_become_mistrals():
    case, policy = Case(llama_config("mha")), Policy([5] * 4, [40] * 4)  # 5 heads do not divide 48
    mistral = case.model(policy)
    assert type(mistral) is MistralForCausalLM and agree(mistral, case.evaluator(), policy, 1e-4)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_result_owns_its_weights(family):
    case, policy = Case(config_of(family)), POLICY["gqa"]
    for refit in (True, False):
        model = case.model(policy, refit)
        before = case.evaluator(refit).log_perplexity(policy)
        for parameter in model.parameters():
            parameter.data.zero_()
        assert case.evaluator(refit).log_perplexity(policy) == before


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_as_small_as_the_policy_says(name):
    """Of the units, that is: norms, embeddings and the output projections' biases are no units."""
    config, policy = CASES[name]
    case = Case(config)
    outputs = tuple(f"{part.output_name}.bias" for part in case.decoder.family.parts.values())
    units = {n: p for n, p in case.model(policy).named_parameters() if "_proj." in n and not n.endswith(outputs)}
    assert sum(p.numel() for p in units.values()) == int(case.grid.kept(case.grid.encode([policy]))[0])


def test_policies_off_the_grid_are_refused():
    with pytest.raises(InputError, match="off the grid"):
        Case().model(Policy([3, 0, 2, 1], [64, 17, 0, 40]))
    with pytest.raises(InputError, match="off the grid"):
        Case(CASES["half of a Llama"][0]).model(Policy([3, 1, 2, 3], [64, 64, 0, 48]))


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
# One of them is uniform: a stock Mistral.
_RELOADED = [
    (llama_config(tie_word_embeddings=True), torch.bfloat16, POLICY["gqa"], "PPFLlamaForCausalLM"),
    (llama_config("mha"), torch.float32, POLICY["mha"], "PPFLlamaForCausalLM"),
    (llama_config(tie_word_embeddings=True), torch.float32, NEITHER, "PPFLlamaForCausalLM"),
    (CASES["half of a Phi-3"][0], torch.float32, AGAIN, "PPFPhi3ForCausalLM"),
    (config_of("gemma3_text"), torch.float32, POLICY["gqa"], "PPFGemma3ForCausalLM"),
    (llama_config("mha"), torch.float32, Policy([5] * 4, [40] * 4), "MistralForCausalLM"),
    (config_of("qwen2"), torch.bfloat16, POLICY["gqa"], "PPFQwen2ForCausalLM"),
]


def test_reloaded_in_a_new_process(tmp_path):
    cases = [Case(config, dtype) for config, dtype, *_ in _RELOADED]
    models = [case.model(policy) for case, (_, _, policy, _) in zip(cases, _RELOADED, strict=True)]
    folders = [str(tmp_path / str(index)) for index in range(len(models))]
    for model, folder in zip(models, folders, strict=True):
        save(model, byte_tokenizer(), folder, {})
    result = fresh.run(_RELOAD, json.dumps(IDS.tolist()), *folders)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    for found, case, model, (_, dtype, policy, name) in zip(lines, cases, models, _RELOADED, strict=True):
        assert found["type"] == type(model).__name__ == name and found["dtype"] == str(dtype)
        with torch.no_grad():
            expected = model(IDS).logits[0].float()
        assert (torch.tensor(found["logits"]) - expected).abs().max() <= 1e-4 * expected.abs().max()
        # 0.5 % in perplexity; bf16 rounds a random model's logits more than a trained one's.
        tolerance = 0.005 if dtype is torch.float32 else 0.02
        assert found["loss"] == pytest.approx(case.evaluator().log_perplexity(policy), abs=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("refit", [False, True])
def test_cuda_result_equals_the_cpus(name, refit):
    config, policy = CASES[name]
    on_cpu, on_gpu = Case(config), Case(config, device="cuda")
    model = on_gpu.model(policy, refit)
    assert model.device.type == "cuda" and agree(model, on_gpu.evaluator(refit), policy, 1e-4)
    assert loss(model) == pytest.approx(loss(on_cpu.model(policy, refit)), rel=1e-3)
