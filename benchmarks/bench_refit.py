"""What pruned models are worth after each refit: perplexity of a run's own policies on a text that nothing has seen.

    python benchmarks/bench_refit.py --run RUN [--run RECOVERED …] --test-text wiki.test.raw \
        --output benchmarks/results/refit_smollm2-135m_h200.json [--refit fast --refit thorough] [--ratio 0.3 …]

RUN is a folder of ``ppf fit``, or of ``ppf recover --elastic``. Every model is made in memory as ``ppf prune`` makes
it; seconds are those of making it, with weights and library read already.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppf._version import versions
from ppf.deliver.results import REFITS
from ppf.fitting.perplexity import computing, log_perplexity_of
from ppf.fitting.reader import Reader
from ppf.fitting.run import Protocol, Run
from ppf.fitting.session import Session
from ppf.storage.files import write_json

RATIOS = 0.2, 0.3, 0.4, 0.5


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("test-text", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--run", type=Path, action="append", required=True)
    parser.add_argument("--ratio", type=float, action="append")
    parser.add_argument("--refit", choices=REFITS, action="append")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def rows(session: Session, ratios: list[float], refits: list[str], test: Tensor) -> Iterator[dict[str, Any]]:
    """One a ratio and refit."""
    run = session.run
    session.library  # noqa: B018 - read before anything is timed
    for ratio in ratios:
        policy = run.policy(ratio).policy
        for refit in refits:
            start = time.perf_counter()
            model = computing(session.materialize(policy, thorough=refit == "thorough"))
            seconds = time.perf_counter() - start
            value = math.exp(log_perplexity_of(model, test))
            print(f"{run.path.name} {ratio} {refit}: {value:.2f}, {seconds:.1f} s", flush=True)
            yield {
                "run": run.path.name, "ratio": ratio, "delivered": run.grid.ratio(policy), "refit": refit,
                "perplexity": value, "seconds": seconds, "elastic": run.manifest.get("elastic"),
            }  # fmt: skip


def main() -> None:
    asked = parsed()
    reading = Reader.of(Run(asked.run[0]).model_path, Run(asked.run[0]).settings.sequence_length).read(asked.test_text)
    test, first = reading.sequences.long(), Run(asked.run[0])
    data: dict[str, Any] = {
        "environment": versions() | {
            "device": torch.cuda.get_device_name() if asked.device != "cpu" else "cpu",
            "date": datetime.now(UTC).date().isoformat(),
        },
        "model": first.model_path.name, "fit": first.settings.to_dict(),
        "protocol": Protocol.of_reading(reading, test, "all of it").to_dict() | {"text": asked.test_text.name},
        "rows": [],
    }  # fmt: skip
    for folder in asked.run:
        session = Session(Run(folder), asked.device)
        for row in rows(session, asked.ratio or list(RATIOS), asked.refit or list(REFITS), test):
            data["rows"].append(row)
            write_json(asked.output, data)


if __name__ == "__main__":
    main()
