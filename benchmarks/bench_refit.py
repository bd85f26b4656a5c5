"""What pruned models are worth after each refit: perplexity of a run's own policies on a text that nothing has seen,
and if asked their figures in tasks and their tokens a second.

    python benchmarks/bench_refit.py --run RUN [--run RECOVERED …] --test-text wiki.test.raw \
        --output benchmarks/results/refit_smollm2-135m_h200.json [--refit fast --refit thorough] \
        [--ratio 0 --ratio 0.3 …] [--tasks arc_easy,piqa --task-folder DIR] [--decode]

RUN is a folder of ``ppf fit``, or of ``ppf recover --elastic``; ratio 0 is the dense model. Every model is made in
memory as ``ppf prune`` makes it; seconds are those of making it, with weights and library read already. ``--decode``
generates 128 tokens after a prompt of 512, one sequence, by PPF's runtime.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppf._version import versions
from ppf.checkpoint import load_tokenizer
from ppf.deliver.results import REFITS
from ppf.fast.runtime.benchmark import decode_row, measure_ceilings
from ppf.fitting.perplexity import computing, load_for_computing, log_perplexity_of
from ppf.fitting.reader import Reader
from ppf.fitting.run import Protocol, Run
from ppf.fitting.session import Session
from ppf.fitting.tasks import Tasks
from ppf.storage.files import write_json

RATIOS = 0.2, 0.3, 0.4, 0.5


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("test-text", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--run", type=Path, action="append", required=True)
    parser.add_argument("--ratio", type=float, action="append")
    parser.add_argument("--refit", choices=REFITS, action="append")
    parser.add_argument("--tasks")
    parser.add_argument("--task-folder", type=Path)
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


Judge = Callable[[PreTrainedModel], dict[str, Any]]


def judge_of(asked: argparse.Namespace, test: Tensor, tokenizer: PreTrainedTokenizerBase) -> Judge:
    """What is told of a model: perplexity, parameters, and what else was asked for."""
    tasks = asked.tasks and Tasks.open(asked.tasks, asked.task_folder)

    def judge(model: PreTrainedModel) -> dict[str, Any]:
        told: dict[str, Any] = {"perplexity": math.exp(log_perplexity_of(model, test))}
        told["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        if asked.decode:
            ceilings = measure_ceilings(model.device, model.dtype)
            told["decode"] = asdict(decode_row(model, "ppf", 1, 512, 128, ceilings, 0.0))
        if tasks:
            told["tasks"] = tasks.score(model, tokenizer)
        return told

    return judge


def rows(session: Session, ratios: list[float], refits: list[str], judge: Judge) -> Iterator[dict[str, Any]]:
    """One a ratio and refit; of the dense model, which has no refit, one in all."""
    run = session.run
    session.library  # noqa: B018 - read before anything is timed
    for ratio in ratios:
        if ratio == 0:
            yield {"ratio": 0.0} | judge(load_for_computing(run.model_path, str(session.device), "auto"))
            continue
        policy = run.policy(ratio).policy
        for refit in refits:
            start = time.perf_counter()
            model = computing(session.materialize(policy, thorough=refit == "thorough"))
            seconds = time.perf_counter() - start
            yield {
                "run": run.path.name, "ratio": ratio, "delivered": run.grid.ratio(policy), "refit": refit,
                "seconds": seconds, "elastic": run.manifest.get("elastic"), "seed": run.settings.seed,
            } | judge(model)  # fmt: skip


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
    judge = judge_of(asked, test, load_tokenizer(first.model_path))
    for folder in asked.run:
        session = Session(Run(folder), asked.device)
        for row in rows(session, asked.ratio or list(RATIOS), asked.refit or list(REFITS), judge):
            print({name: row.get(name) for name in ("run", "ratio", "refit", "perplexity", "seconds")}, flush=True)
            data["rows"].append(row)
            write_json(asked.output, data)


if __name__ == "__main__":
    main()
