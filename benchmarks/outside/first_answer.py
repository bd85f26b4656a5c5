"""What PPF answers from calibration alone, and CFSP's allocation on the same run, scored as the other tools are.

    python benchmarks/outside/first_answer.py MODEL CALIBRATION TEST --run RUN \
        --output benchmarks/results/outside_ppf_cpu.json [--calibration-tokens 131072]

Run by the Python of PPF's environment. RUN is made by ``ppf fit MODEL --text CALIBRATION --evaluations 0
--sequence-length 1024`` unless it is there. "PPF, first answer" is what ``ppf prune RUN --ratio R`` writes; "CFSP's
allocation" is the policy of ``ppf/lab/peers/cfsp.py`` through ``ppf prune RUN --policy FILE``: PPF's ranking and refit,
CFSP's widths. The fit's seconds stand beside the rows, which have those of ``ppf prune``, start and writing included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppf.choose.budget import RatioBudget
from ppf.fitting.run import Run
from ppf.fitting.session import Session
from ppf.lab.peers import cfsp
from ppf.lab.peers.statistics import PeerStatistics

PEERS = {"CFSP's allocation, PPF's refit": cfsp}


def ppf(asked: argparse.Namespace, *words: Any) -> float:
    """Seconds of a command."""
    start = time.perf_counter()
    subprocess.run([asked.ppf, *(str(word) for word in words), "--device", asked.device, "--json"], check=True)
    return time.perf_counter() - start


def fitted(asked: argparse.Namespace) -> float | None:
    """Seconds of the fit, None if the run was there."""
    if asked.run.exists():
        return None
    size = "--sequence-length", asked.length, "--calibration-tokens", asked.calibration_tokens
    words = "--text", asked.calibration, "--evaluations", 0, *size, "--output", asked.run
    return ppf(asked, "fit", asked.model, *words, "--timings")


def answers(asked: argparse.Namespace, ratios: list[float], folder: Path) -> Iterator[tuple[str, float, list[Any]]]:
    """Method, ratio, and what ``ppf prune`` is to be asked."""
    session = Session(Run(asked.run), asked.device)
    statistics, grid = PeerStatistics.of_run(session.run, session.evaluator(), 0), session.run.grid
    for ratio in ratios:
        yield "PPF, first answer", ratio, ["--ratio", ratio]
        for name, peer in PEERS.items():
            policy = peer.allocate(session.run.structure, statistics, RatioBudget(grid, ratio))
            file = folder / f"{peer.__name__} {ratio}.json"
            file.write_text(json.dumps(policy.to_dict()), encoding="utf-8")
            yield name, ratio, ["--policy", file]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.set_defaults(calibration_tokens=131_072)
    asked = parser.parse_args()
    tokenizer, results = AutoTokenizer.from_pretrained(asked.model), common.Results(asked, ("ppf",))
    if (seconds := fitted(asked)) is not None:
        results.data["fit_seconds"] = seconds
        print(f"fit: {seconds:.0f} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="outside-") as scratch:
        folder, scorer = Path(scratch), common.Scorer(asked, tokenizer, Path(scratch))
        results.data["dense"] = scorer.dense()
        for name, ratio, words in answers(asked, asked.ratio or list(common.RATIOS), folder):
            seconds = ppf(asked, "prune", asked.run, *words, "--output", folder / "result", "--force")
            model = AutoModelForCausalLM.from_pretrained(folder / "result", dtype="float32").to(asked.device).eval()
            results.add({"method": name, "asked": ratio, "seconds": seconds} | scorer.row(model, folder / "result"))


if __name__ == "__main__":
    main()
