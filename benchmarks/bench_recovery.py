"""What recovery training gives back: perplexity before and after, for each method. Needs a GPU and the extra ``train``.

    python benchmarks/bench_recovery.py --output benchmarks/results/recover_ref-14m_h100.json \
        --model MODEL --text calibration.txt --test-text test.txt

Fits MODEL with 200 evaluations, prunes half of its decoder, recovers that with every method (and LoRA with the text
alone), and scores each result on a text that neither the fit nor the training has seen. About two minutes for a model
of 14M parameters on an idle H100.
"""

from __future__ import annotations

import argparse
import datetime
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ppf
from ppf._version import versions
from ppf.deliver.results import choose, deliver
from ppf.fitting.evaluation.scoring import model_log_perplexity
from ppf.fitting.perplexity import load_for_computing
from ppf.fitting.reader import Reader
from ppf.fitting.run import Protocol
from ppf.storage.files import write_json

RATIO, EVALUATIONS, LENGTH = 0.5, 200, 512
# Name → settings that are not the default's.
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "full": {"method": "full"},
    "norms": {"method": "norms"},
    "lora, half text": {"method": "lora", "distillation": 0.5},
    "lora, text alone": {"method": "lora", "distillation": 0.0},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "text", "test-text", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def perplexity(folder: Path, sequences: torch.Tensor, device: str) -> float:
    """Of the checkpoint in ``folder``, as ``ppf eval`` measures it."""
    return math.exp(model_log_perplexity(load_for_computing(folder, device, "auto"), sequences))


def variants(asked: argparse.Namespace, pruned: Path, sequences: torch.Tensor) -> Sequence[dict[str, Any]]:
    """One row a variant: its settings, its own report, and its perplexity on the test text."""
    rows = []
    for index, (name, settings) in enumerate(VARIANTS.items()):
        output, start = pruned.with_name(f"recovered-{index}"), time.perf_counter()
        wanted = ppf.RecoverySettings(tokens=asked.tokens, **settings)
        report = ppf.recover(pruned, asked.text, output, settings=wanted, device=asked.device)
        held_out = {"before": report["recovery"]["before"]["perplexity"], "after": report["measured"]["perplexity"]}
        rows.append({
            "name": name,
            "settings": wanted.to_dict(),
            "perplexity": perplexity(output, sequences, asked.device),
            "held_out": held_out,
            "training_seconds": report["recovery"]["seconds"],
            "seconds": time.perf_counter() - start,
        })  # fmt: skip
        print(f"{name}: {rows[-1]['perplexity']:.2f}", flush=True)
    return rows


def main() -> None:
    """Fit, prune, recover with every method, write the rows."""
    asked = arguments()
    reader = Reader.of(asked.model, LENGTH)
    reading = reader.read(asked.test_text)
    sequences = reading.sequences.long()
    with tempfile.TemporaryDirectory(prefix="ppf-recovery-") as folder:
        settings = ppf.Settings(evaluations=EVALUATIONS)
        run = ppf.fit(asked.model, asked.text, Path(folder) / "run", settings=settings, device=asked.device)
        session, pruned = ppf.Session(run, asked.device), Path(folder) / "pruned"
        report = deliver(session, choose(session, RATIO), pruned)
        data = {
            "environment": versions()
            | {
                "device": torch.cuda.get_device_name() if asked.device != "cpu" else "cpu",
                "date": datetime.date.today().isoformat(),
            },
            "model": asked.model.name,
            "delivered_ratio": report["delivered_ratio"],
            "policy": report["policy"],
            "fit": settings.to_dict(),
            "protocol": Protocol.of_reading(reading, sequences, "all of it").to_dict() | {"text": asked.test_text.name},
            "dense": perplexity(asked.model, sequences, asked.device),
            "pruned": perplexity(pruned, sequences, asked.device),
            "rows": variants(asked, pruned, sequences),
        }
    write_json(asked.output, data)


if __name__ == "__main__":
    main()
