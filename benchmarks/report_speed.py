"""Sections of docs/benchmarks.md on whole models and on predictions: generation, latency tables, predictors."""

from __future__ import annotations

from collections import defaultdict

from tables import MODELS, load, table

_RUNNERS = {"ppf": "PPF", "eager": "stock, eager", "compiled": "stock, static cache and torch.compile"}


def decode_section(name: str) -> str:
    """Generation with random weights, dense and half the size, against stock transformers in the same run."""
    data = load(name)
    lines = [
        (MODELS[model], f"{row['ratio']:.0%}", row["phase"], f"{row['batch']} × {row['prompt']}",
         _RUNNERS[row["runner"]], f"{row['milliseconds']:.2f}", f"{row['tokens_per_second']:,.1f}",
         f"{row['share_of_limit']:.0%}")
        for model, found in data["models"].items()
        for row in found["rows"]
    ]  # fmt: skip
    titles = ("shapes", "removed", "phase", "prompts", "runner", "ms", "tokens a second", "share of limit")
    facts = (
        f"{data['gpu']}, torch {data['torch']}, transformers {data['transformers']}, {data['date']}; copy "
        f"{data['copy_TB_per_s']:.2f} TB/s, product {data['product_TFLOP_per_s']:.0f} TFLOP/s; bf16. ms of a decoding "
        "step or a whole prompt; the limit is the bytes that a step must read, or the operations of a prompt."
    )
    parts = [facts, table(titles, lines)]
    elastic = {model: found["elastic"] for model, found in data["models"].items() if "elastic" in found}
    if elastic:
        rows = [
            (MODELS[model], kind, f"{of['again_ms_median']:.2f}", f"{of['again_ms_max']:.2f}",
             " / ".join(f"{ms:.0f}" for ms in of["first_ms"]))
            for model, kinds in elastic.items()
            for kind, of in kinds.items()
        ]  # fmt: skip
        parts += [
            "`set_ratio` of an elastic model, back and forth between 30 and 50 %:",
            table(("shapes", "policies", "ms, median", "ms, largest", "ms, first time (solving refits)"), rows),
        ]
    return "\n\n".join(parts)


def profiling_section(name: str) -> str:
    """How far sums of a latency table are from whole models."""
    data = load(name)
    groups = defaultdict(list)
    for row in data["rows"]:
        workload = row["workload"]
        key = row["shape"], f"{workload['phase']}, {workload['batch']} × {workload['tokens']}"
        groups[key].append(abs(row["off"]))
    lines = [
        (*key, str(len(off)), f"{sum(off) / len(off):.1%}", f"{max(off):.1%}", f"{sum(o <= 0.05 for o in off)}")
        for key, off in groups.items()
    ]
    facts = (
        f"{data['device']}, torch {data['versions']['torch']}, {data['date']}; {data['dtype']}. The latency that `ppf "
        "profile` predicts of a policy, against the policy's own model, timed."
    )
    titles = ("shape", "workload", "policies", "off, mean", "off, largest", "within 5 %")
    return f"{facts}\n\n" + table(titles, lines)


def predictor_section(name: str) -> str:
    """What a prediction takes."""
    data = load(name)
    where = data["environment"]
    lines = [
        (row["kind"], f"{row['measurements']:,}", f"{row['fit_s']:.1f}", f"{row['one_ms']:.2f}",
         f"{row['one_recorded_ms']:.2f}" if "one_recorded_ms" in row else "", f"{row['per_second']:,.0f}")
        for row in data["rows"]
    ]  # fmt: skip
    titles = ("kind", "measurements", "training, s", "one policy, ms", "as a CUDA graph, ms", "policies a second")
    facts = f"{where['device']}, {where['threads']} CPU threads, torch {where['torch']}, {where['date']}."
    parts = [facts, table(titles, lines)]
    if test := data.get("test_set"):
        parts.append(
            f"Against true evaluations on the whole test set ({test['tokens']:,} tokens, ref-14m), in one process: one "
            f"policy {1e3 * test['evaluate_one_s']:.1f} ms and {1e3 * test['predict_one_s']:.2f} ms predicted; in "
            f"batches {1e3 * test['evaluate_in_a_batch_s']:.1f} ms and {1e6 * test['predict_in_a_batch_s']:.2f} µs, "
            f"{test['times_faster_batch']:,.0f} times."
        )
    return "\n\n".join(parts)
