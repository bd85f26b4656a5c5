"""True evaluations a second, beside the time that their products take at the measured product rate. Needs a GPU.

    python benchmarks/bench_evaluation.py --output benchmarks/results/evaluation_h200.json \
        --model MODEL --text calibration.txt --eval-text evaluation.txt

MODEL is a small checkpoint: it is calibrated and refitted, then evaluated on random policies, on uniform ones at 50 %
and on an evolution's offspring, at several numbers of tokens, beside the same policies one at a time; its perplexities
are compared with those of fp32. Then Llama-2-7B's shape with random weights, uniform at 50 %. ``limit`` counts only
operations: products of kept weights, causal attention and the head, over the rate of an 8192-cubed bf16 product
measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ppf import checkpoint
from ppf.choose.candidates.sampling import mutate, random_levels, random_ratios, uniform_policy
from ppf.fast.plan import executed
from ppf.fitting.calibration import calibrate
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.evaluation.serial import Serial
from ppf.fitting.library import Library, refit_layer
from ppf.fitting.ranking import rank_layer
from ppf.model.grid import Grid
from ppf.model.policy import Policy
from ppf.model.structure import Structure
from ppf.model.weights import DecoderWeights, LayerWeights, permute_layer
from ppf.text import pack, read_tokens, take_tokens

DEVICE = torch.device("cuda")
LLAMA_2_7B = Structure(layers=32, hidden=4096, kv_groups=32, heads_per_group=1, head_dim=128, channels=11008)
VOCABULARY = 32_000


def seconds(call: Callable[[], object], laps: int = 3) -> float:
    """Median wall-clock seconds of a call, until the GPU is idle."""
    call()
    times = []
    for _ in range(laps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[laps // 2]


def product_rate() -> float:
    """FLOP/s of an 8192-cubed bf16 product."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * 8192**3 * 20 / seconds(lambda: [a @ b for _ in range(20)])


def operations(grid: Grid, policies: Sequence[Policy], tokens: int, length: int, vocabulary: int) -> float:
    """Mean operations of one policy: kept products, causal attention (half the square), and the head."""
    s = grid.structure
    kept = grid.kept(grid.encode(policies)).double().mean().item()
    heads = sum(sum(p.attention) for p in policies) / len(policies) * s.group_rows
    return tokens * (2 * kept + 2 * heads * length + 2 * s.hidden * vocabulary)


def small_model(model: Path, text: Path, eval_text: Path) -> tuple[DecoderWeights, Grid, Library, Tensor]:
    """Ranked weights, grid (multiple 64), refits and evaluation sequences of 512, all on the GPU."""
    dense = checkpoint.load_dense(model, device="cuda")
    tokenizer = checkpoint.load_tokenizer(model)
    weights = DecoderWeights.from_model(dense)
    grid = Grid(weights.structure)
    sequences = take_tokens(pack(read_tokens(text, tokenizer), 512), 131_072)
    layers, refits = [], []
    for layer, statistics in zip(weights.layers, calibrate(weights, sequences), strict=True):
        ranking = rank_layer("wanda-sp", layer, statistics, grid.structure)
        layers.append(permute_layer(layer, ranking, grid.structure))
        refits.append(refit_layer(layers[-1], statistics, ranking, grid))
    library = Library([attention for attention, _ in refits] + [ffn for _, ffn in refits])
    ranked = DecoderWeights(weights.structure, weights.embedding, tuple(layers), weights.norm, weights.head,
                            weights.rotary, weights.epsilon)  # fmt: skip
    return ranked, grid, library, pack(read_tokens(eval_text, tokenizer), 512).to(DEVICE)


def families(grid: Grid, count: int) -> dict[str, list[Policy]]:
    """Random policies over all ratios; one uniform policy; a parent's offspring at 50 %."""
    generator = torch.Generator().manual_seed(0)
    half = uniform_policy(grid, 0.5)
    parents = random_levels(grid, torch.full((8,), 0.5), generator)
    children = mutate(parents.repeat(count // 8, 1), grid, generator, swaps=3, ratio=0.5)
    return {
        "random, 5-70 %": grid.decode(random_levels(grid, random_ratios(count, generator), generator)),
        "uniform, 50 %": [half],
        "offspring of 8 parents, 50 %": grid.decode(children),
    }


def small_rows(arguments: argparse.Namespace, rate: float) -> Iterator[dict]:
    weights, grid, library, text = small_model(arguments.model, arguments.text, arguments.eval_text)
    for tokens in (49_152, 16_384, 2_048):
        sequences = take_tokens(text, tokens)
        evaluator = Evaluator(weights, grid, sequences, library)
        serial = Serial(weights, grid, sequences, library)
        for name, policies in families(grid, 128).items():
            levels = [executed(row) for row in grid.encode(policies).tolist()]
            took = seconds(lambda p=policies, e=evaluator: e.log_perplexities(p)) / len(policies)
            one = seconds(lambda x=levels, e=serial: [e.losses([row]) for row in x[:8]]) / min(8, len(levels))
            work = operations(grid, policies, sequences.numel(), 512, len(weights.head))
            yield row(arguments.model.name, name, sequences, took, work / rate, one_at_a_time=1 / one)
    yield precision_row(weights, grid, library, take_tokens(text, 49_152))


def precision_row(weights: DecoderWeights, grid: Grid, library: Library, sequences: Tensor) -> dict:
    """The largest relative difference in perplexity from fp32, and whether two passes agree bit for bit."""
    policies = [p for family in families(grid, 24).values() for p in family]
    exact = Evaluator(weights.to(torch.float32), grid, sequences, library.to(torch.float32))
    expected = torch.tensor(exact.log_perplexities(policies))
    ours = Evaluator(weights, grid, sequences, library)
    first, second = ours.log_perplexities(policies), ours.log_perplexities(policies[::-1])[::-1]
    worst = (torch.tensor(first) - expected).exp().sub(1).abs().max().item()
    result = {"what": "bf16 against fp32", "policies": len(policies), "worst_relative_perplexity": worst}
    return result | {"bit_identical_in_any_company": first == second}


def random_weights(s: Structure) -> DecoderWeights:
    """Weights of a model's shape, bf16, small enough that activations stay finite."""

    def draw(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=torch.bfloat16, device=DEVICE).mul_(0.02)

    one = torch.ones(s.hidden, dtype=torch.bfloat16, device=DEVICE)
    queries, keys = s.kv_groups * s.group_rows, s.kv_groups * s.head_dim
    layers = tuple(
        LayerWeights(
            one, draw(queries, s.hidden), draw(keys, s.hidden), draw(keys, s.hidden), draw(s.hidden, queries), one,
            draw(s.channels, s.hidden), draw(s.channels, s.hidden), draw(s.hidden, s.channels),
        )
        for _ in range(s.layers)
    )  # fmt: skip
    config = LlamaConfig(hidden_size=s.hidden, num_attention_heads=s.kv_groups * s.heads_per_group)
    rotary = LlamaRotaryEmbedding(config).to(DEVICE)
    return DecoderWeights(s, draw(VOCABULARY, s.hidden), layers, one, draw(VOCABULARY, s.hidden), rotary, 1e-5)


def large_rows(rate: float) -> Iterator[dict]:
    """Llama-2-7B's shape at 16,384 tokens. Without a library: its solved weights have the shapes of the prefixes."""
    weights, grid = random_weights(LLAMA_2_7B), Grid(LLAMA_2_7B, 688)
    sequences = torch.randint(0, VOCABULARY, (8, 2048), device=DEVICE)
    evaluator = Evaluator(weights, grid, sequences)
    generator = torch.Generator().manual_seed(0)
    for name, policies in {
        "uniform, 50 %": [uniform_policy(grid, 0.5)],
        "random, 50 %": grid.decode(random_levels(grid, torch.full((8,), 0.5), generator)),
    }.items():
        took = seconds(lambda p=policies: evaluator.log_perplexities(p)) / len(policies)
        work = operations(grid, policies, sequences.numel(), 2048, VOCABULARY)
        yield row("llama-2-7b shape", name, sequences, took, work / rate)


def row(model: str, policies: str, sequences: Tensor, took: float, limit: float, **others: float) -> dict:
    result = {"model": model, "policies": policies, "tokens": sequences.numel(), "sequence": sequences.shape[1]}
    result |= {"ms": round(1e3 * took, 3), "per_second": round(1 / took, 1), "limit_ms": round(1e3 * limit, 3)}
    return result | {"share_of_limit": round(limit / took, 3)} | {k: round(v, 1) for k, v in others.items()}


def write_rows(path: Path, report: dict, rows: Iterable[dict]) -> None:
    """Print each row and write the report with all rows so far: a run that is stopped leaves what it has measured."""
    report = report | {"rows": []}
    for found in rows:
        print(json.dumps(found), flush=True)
        report["rows"].append(found)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    for name in ("--model", "--text", "--eval-text"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rate = product_rate()
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "product_TFLOP_per_s": round(rate / 1e12, 1),
    }
    with torch.no_grad():
        write_rows(arguments.output, report, chain(large_rows(rate), small_rows(arguments, rate)))


if __name__ == "__main__":
    main()
