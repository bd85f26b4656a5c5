"""Do policies keep their order when they are recovered? Perplexity of many policies of one ratio, before and after.

    python benchmarks/bench_order.py --run RUN --text corpus.txt --test-text wiki.test.raw \
        --output benchmarks/results/order_ref-14m_h200.json [--tokens 1000000] [--policies 20] [--ratio 0.3]

Policies of RUN's grid: the run's own, the uniform one, that of calibration alone, the best and the worst ones that the
fit measured near the ratio, and random ones. Each is pruned with the library's refit, trained on as many tokens of
--text as all others (LoRA, the dense model as teacher), and scored on a text that neither the fit nor the training saw.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from scipy.stats import kendalltau, spearmanr

from ppf._version import versions
from ppf.choose.budget import RatioBudget
from ppf.choose.candidates.sampling import random_levels, uniform_policy
from ppf.deliver.recovery import RecoverySettings, recover
from ppf.deliver.results import Choice, deliver
from ppf.fitting.perplexity import load_for_computing, log_perplexity_of
from ppf.fitting.reader import Reader
from ppf.fitting.run import Protocol, Run
from ppf.fitting.session import Session
from ppf.model.policy import Policy
from ppf.storage.files import write_json

_NEAR = 0.01  # of the ratio asked for: measured policies that stand beside the others


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "text", "test-text", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--policies", type=int, default=20)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


def candidates(run: Run, ratio: float, count: int) -> dict[Policy, str]:
    """``count`` different policies of about ``ratio``, with what they are."""
    found = {run.policy(ratio).policy: "PPF's", uniform_policy(run.grid, ratio): "uniform"}
    if run.first is not None:
        found.setdefault(run.grid.decode(run.first(torch.tensor([ratio], dtype=torch.float64)))[0], "calibration's")
    near = sorted(
        (row for row in run.experience.rows() if abs(row.ratio - ratio) <= _NEAR), key=lambda row: row.log_perplexity
    )
    quarter = count // 4
    for row in [*near[:quarter], *near[-quarter:]][: 2 * quarter]:
        found.setdefault(row.policy, f"measured, {row.source}")
    generator = torch.Generator().manual_seed(0)
    while len(found) < count:
        found.setdefault(run.grid.decode(random_levels(run.grid, torch.tensor([ratio]), generator))[0], "random")
    return dict(list(found.items())[:count])


def rows(asked: argparse.Namespace, session: Session, test: torch.Tensor) -> Iterator[dict[str, Any]]:
    settings = RecoverySettings("lora", tokens=asked.tokens, sequence_length=session.run.settings.sequence_length)
    for policy, kind in candidates(session.run, asked.ratio, asked.policies).items():
        with tempfile.TemporaryDirectory() as place:
            pruned, recovered = Path(place) / "pruned", Path(place) / "recovered"
            deliver(session, Choice(policy, "given", RatioBudget(session.run.grid, asked.ratio)), pruned)
            report = recover(pruned, asked.text, recovered, settings=settings, device=asked.device)
            before, after = (
                math.exp(log_perplexity_of(load_for_computing(folder, asked.device, "auto"), test))
                for folder in (pruned, recovered)
            )
        found = {"policy": policy.to_dict(), "kind": kind, "ratio": session.run.grid.ratio(policy)}
        yield found | {"before": before, "after": after, "seconds": report["recovery"]["seconds"]}


def agreement(found: list[dict[str, Any]]) -> dict[str, float]:
    """Rank correlations of before and after, and the factor by which the best before is behind the best after."""
    before, after = ([row[name] for row in found] for name in ("before", "after"))
    chosen = after[before.index(min(before))]
    return {
        "spearman": float(spearmanr(before, after).statistic), "kendall": float(kendalltau(before, after).statistic),
        "regret": chosen / min(after),
    }  # fmt: skip


def main() -> None:
    asked = parsed()
    session = Session(Run(asked.run), asked.device)
    run, found = session.run, []
    reading = Reader.of(run.model_path, run.settings.sequence_length).read(asked.test_text)
    test = reading.sequences.long()
    device = torch.cuda.get_device_name() if asked.device != "cpu" else "cpu"
    data: dict[str, Any] = {
        "environment": versions() | {"device": device, "date": datetime.now(UTC).date().isoformat()},
        "model": run.model_path.name, "fit": run.settings.to_dict(), "tokens": asked.tokens,
        "protocol": Protocol.of_reading(reading, test, "all of it").to_dict() | {"text": asked.test_text.name},
    }  # fmt: skip
    for row in rows(asked, session, test):
        found.append(row)
        print(row["kind"], f"{row['before']:.2f} -> {row['after']:.2f}, {row['seconds']:.0f} s", flush=True)
        write_json(asked.output, data | {"rows": found} | (agreement(found) if len(found) > 2 else {}))


if __name__ == "__main__":
    main()
