"""What real models lose: PPF beside uniform and Puzzle's integer program, and results beside the masks they come from.

    python benchmarks/bench_families.py --output benchmarks/results/family_smollm2-135m_h100.json --model MODEL \
        --text calibration.txt --eval-text evaluation.txt --test-text test.txt [--evaluations 1500] [--device cuda]

One fit of MODEL, a checkpoint of any family; then for each ratio the agent's policy is delivered to disk and opened
again. Perplexities on the test text, which nothing saw: masked (the evaluator, no surgery), materialised, reloaded;
the same ranking, refit and evaluator for all. Greedy text of the dense model and of each result stands beside them.
``--puzzle 0`` leaves Puzzle out, which measures every level of every sub-layer once. SmolLM2-135M with 1,500
evaluations: about three minutes on an H100, texts from WikiText-2.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ppf
from ppf._version import versions
from ppf.checkpoint import load_tokenizer
from ppf.choose.budget import RatioBudget
from ppf.deliver.results import choose, deliver
from ppf.fast.runtime.generation import generate
from ppf.fitting.evaluation.scoring import in_compute_dtype, model_log_perplexity
from ppf.fitting.perplexity import load_for_computing
from ppf.fitting.reader import Reader
from ppf.fitting.run import Protocol, Settings
from ppf.fitting.session import Session
from ppf.lab.peers import puzzle, uniform
from ppf.lab.peers.statistics import PeerStatistics
from ppf.model.policy import Policy
from ppf.storage.files import write_json
from ppf.text import take_tokens

RATIOS = 0.1, 0.2, 0.3
PROMPT, NEW_TOKENS = "The city of Paris is known for", 32


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "text", "eval-text", "test-text", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name, value in (("evaluations", 1500), ("tokens", 32_768), ("length", 1024), ("puzzle", 100_000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--test-tokens", type=int, help="about so many of the test text; all if left out")
    parser.add_argument("--ffn-multiple", type=int, default=64)
    parser.add_argument("--calibration-tokens", type=int, default=131_072)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def continued(folder: Path, device: str) -> str:
    """Greedy text of a checkpoint."""
    tokenizer, model = load_tokenizer(folder), load_for_computing(folder, device, "auto")
    given = tokenizer(PROMPT, return_tensors="pt")["input_ids"].to(model.device)
    output = generate(model, given, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, given.shape[1] :], skip_special_tokens=True)


def policies_of_peers(session: Session, asked: argparse.Namespace) -> dict[str, dict[float, Policy]]:
    """Uniform's and Puzzle's policies for every ratio."""
    run = session.run
    statistics = PeerStatistics.of_run(run, session.evaluator(), asked.puzzle)
    budgets = {ratio: RatioBudget(run.grid, ratio) for ratio in RATIOS}
    found = {"uniform": {r: uniform.allocate(run.structure, statistics, b) for r, b in budgets.items()}}
    if asked.puzzle:
        damages = puzzle.damages(statistics, run.grid)
        found["puzzle"] = {r: puzzle.solve(damages, b) for r, b in budgets.items()}
    return found


def rows(session: Session, asked: argparse.Namespace, test: Tensor) -> Iterator[dict[str, Any]]:
    """One row a ratio."""
    evaluator, peers = session.evaluator(sequences=test), policies_of_peers(session, asked)
    for ratio in RATIOS:
        choice = choose(session, ratio)
        with tempfile.TemporaryDirectory(prefix="ppf-family-") as folder:
            output = Path(folder) / "result"
            deliver(session, choice, output)
            reloaded = load_for_computing(output, asked.device, "auto")
            text, kind = continued(output, asked.device), type(reloaded).__name__
            again = model_log_perplexity(reloaded, test)
        made = model_log_perplexity(in_compute_dtype(session.materialize(choice.policy)), test)
        masked = evaluator.log_perplexity(choice.policy)
        found = {"masked": masked, "materialised": made, "reloaded": again}
        found |= {name: evaluator.log_perplexity(policies[ratio]) for name, policies in peers.items()}
        yield {
            "ratio": ratio, "delivered": session.run.grid.ratio(choice.policy), "class": kind,
            "policy": choice.policy.to_dict(), "text": text,
            "perplexity": {name: math.exp(value) for name, value in found.items()},
        }  # fmt: skip


def main() -> None:
    asked = parsed()
    settings = Settings(
        evaluations=asked.evaluations, sequence_length=asked.length, evaluation_tokens=asked.tokens,
        ffn_multiple=asked.ffn_multiple, calibration_tokens=asked.calibration_tokens,
    )  # fmt: skip
    reading = Reader.of(asked.model, asked.length).read(asked.test_text)
    test = reading.sequences.long()
    test = take_tokens(test, asked.test_tokens) if asked.test_tokens else test
    part = "evenly spaced sequences" if asked.test_tokens else "all of it"
    with tempfile.TemporaryDirectory(prefix="ppf-family-") as folder, torch.no_grad():
        started = time.perf_counter()
        with torch.enable_grad():
            run = ppf.fit(
                asked.model, asked.text, Path(folder) / "run", settings=settings, eval_text=asked.eval_text,
                device=asked.device,
            )  # fmt: skip
        fitted = time.perf_counter() - started
        session = Session(run, asked.device)
        data: dict[str, Any] = {
            "environment": versions() | {
                "device": torch.cuda.get_device_name() if session.device.type == "cuda" else "cpu",
                "date": datetime.now(UTC).date().isoformat(),
            },
            "model": asked.model.name, "fit": settings.to_dict(), "fit_seconds": fitted,
            "protocol": Protocol.of_reading(reading, test, part).to_dict() | {"text": asked.test_text.name},
            "prompt": PROMPT, "dense": {"text": continued(asked.model, asked.device)},
            "rows": [],
        }  # fmt: skip
        data["dense"]["perplexity"] = math.exp(session.evaluator(sequences=test).log_perplexity(run.grid.dense()))
        print(f"fit {fitted:.0f} s, dense {data['dense']}", flush=True)
        for row in rows(session, asked, test):
            data["rows"].append(row)
            print(row["ratio"], row["perplexity"], repr(row["text"]), flush=True)
            write_json(asked.output, data)


if __name__ == "__main__":
    main()
