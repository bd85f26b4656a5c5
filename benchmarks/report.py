"""Turns benchmarks/results/*.json into docs/benchmarks.md and its plots. Run it after every new measurement.

python benchmarks/report.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "ppf"  # the same figures give the same file
import matplotlib.pyplot as plt  # noqa: E402  (after the back end is chosen)
from report_speed import decode_section, predictor_section, profiling_section  # noqa: E402
from tables import DOCS, MODELS, RESULTS, Row, load, table  # noqa: E402


def gather_section(name: str) -> str:
    """The gather's rows: share of the limit, and against index_select."""
    data = load(name)
    where = data["environment"]
    rows = [
        (row["name"], f"{row['keep']:.0%}", f"{row['ms']:.3f}", f"{row['share_of_limit']:.0%}",
         f"{row['times_index_select']:.2f} ×")
        for row in data["rows"]
    ]  # fmt: skip
    facts = f"{where['device']}, torch {where['torch']}, {where['date']}; copy {data['copy_GB/s']:,.0f} GB/s"
    return f"{facts}.\n\n" + table(("gather", "keep", "ms", "share of limit", "against index_select"), rows)


def gemm_rows(data: dict[str, Any]) -> list[Sequence[str]]:
    """One line a measurement: time, share of the limit, speed against what a user would run instead."""

    def times(row: Row, peer: str) -> str:
        value = row.get(f"times_faster_than_{peer}")
        return "" if value is None else f"{value:.2f} ×"

    return [
        (row["op"], row["selection"], f"{row['keep']:.0%}" if isinstance(row["keep"], float) else str(row["keep"]),
         f"{row['tokens']:,}", f"{row['us']:,.1f}", f"{row['share_of_limit']:.0%}",
         times(row, "shrunk"), times(row, "masked"), times(row, "slice"))
        for row in data["rows"]
    ]  # fmt: skip


def gemm_section(model: str) -> str:
    """All masked products of one model's shapes."""
    data = load(f"masked_gemm_{model}_h100.json")
    titles = ("op", "selection", "keep", "tokens", "µs", "share of limit", "shrunk", "masked", "slice")
    facts = (
        f"{data['gpu']}, torch {data['torch']}, triton {data['triton']}, {data['date']}; copy "
        f"{data['copy_TB_per_s']:.2f} TB/s, 8192³ product {data['product_TFLOP_per_s']:.0f} TFLOP/s."
    )
    return f"{facts}\n\n" + table(titles, gemm_rows(data))


def evaluation_section(name: str) -> str:
    """True evaluations a second, and how far bf16 is from fp32."""
    data = load(name)
    rows, precision = [row for row in data["rows"] if "ms" in row], [row for row in data["rows"] if "what" in row][0]
    titles = ("model", "policies", "tokens", "ms", "a second", "limit, ms", "share of limit", "one at a time, a second")
    lines = [
        (row["model"], row["policies"], f"{row['tokens']:,}", f"{row['ms']:.2f}", f"{row['per_second']:,.1f}",
         f"{row['limit_ms']:.2f}", f"{row['share_of_limit']:.0%}",
         f"{row['one_at_a_time']:.0f}" if "one_at_a_time" in row else "")
        for row in rows
    ]  # fmt: skip
    facts = (
        f"{data['gpu']}, torch {data['torch']}, {data['date']}; 8192³ product {data['product_TFLOP_per_s']:.0f} TFLOP/s"
    )
    note = (
        f"{facts}; bf16. The limit is the kept products, causal attention and the head at that rate. In bf16 the "
        f"perplexities of {precision['policies']} policies of {rows[-1]['model']} are within "
        f"{precision['worst_relative_perplexity']:.2%} of fp32's, the same bits in any company."
    )
    note += f" {data['note']}" if "note" in data else ""
    return f"{note}\n\n" + table(titles, lines)


def library_section(name: str) -> str:
    """Building libraries, and what rankings and refits are worth."""
    data = load(name)
    large = next(row for row in data["rows"] if "stages" in row and "factor_GB" in row)
    limit = large["limits"]
    stages = [(k, f"{v:.2f}", f"{limit[k]:.2f}" if k in limit else "") for k, v in large["stages"].items()]
    stages.append(("all", f"{large['seconds']:.2f}", f"{large['limit_seconds']:.2f}"))
    kinds = [f"{kind} {ratio}" for ratio in ("30%", "50%") for kind in ("refit", "masked_with_biases", "masked")]
    quality = [
        (row["ranking"], *(f"{row['perplexity_' + kind.replace(' ', '_')]:.1f}" for kind in kinds))
        for row in data["rows"]
        if "ranking" in row
    ]
    speed = ", ".join(
        f"{kind} {data[f'product_TFLOP_per_s_{kind}']:.0f}" for kind in ("bfloat16", "float32", "float64")
    )
    facts = f"{data['gpu']}, torch {data['torch']}, {data['date']}; 8192³ products, TFLOP/s: {speed}."
    sizes = (
        f"Llama-2-7B's shape, random weights, {large['calibration_tokens']:,} tokens, {large['levels']:,} levels: "
        f"factors {large['factor_GB']:.1f} GB, solutions {large['solution_GB']:.1f} GB; peak "
        f"{large['peak_GB_with_factors']:.1f} GB with all factors on the device, "
        f"{large['peak_GB_with_solutions']:.1f} GB when solutions replace them."
    )
    protocol = (
        "Perplexity of uniform policies of ref-14m (49,152 tokens of WikiText-2's validation set, sequences of 512) by "
        "ranking: with the refit, masked with FLAP's biases, masked."
    )
    titles = ("ranking", *(kind.replace("_", " ") for kind in kinds))
    parts = facts, sizes, table(("stage", "seconds", "limit"), stages), protocol, table(titles, quality)
    return "\n\n".join(parts)


def small_section(model: str) -> str:
    """1 and 16 tokens without a graph, and how much of the limit whole rows leave; "" for files that lack them."""
    rows = [row for row in load(f"masked_gemm_{model}_h100.json")["rows"] if "eager_us" in row]
    titles = ("selection", "keep", "tokens", "µs in a graph", "µs eager", "shrunk", "masked", "reachable share")
    lines = [
        (row["selection"], f"{row['keep']:.0%}", f"{row['tokens']}", f"{row['us']:.1f}", f"{row['eager_us']:.1f}",
         f"{row['eager_times_faster_than_shrunk']:.2f} ×", f"{row['eager_times_faster_than_masked']:.2f} ×",
         f"{row.get('whole_rows', 1):.0%}")
        for row in rows
    ]  # fmt: skip
    return table(titles, lines) if lines else ""


def experiments_section() -> str:
    """One MLP at 1 and 16 tokens on an H100, replayed in a graph and launched call by call."""
    data = load("experiments_h100.json")
    cells: dict[tuple[str, float, int], dict[str, Row]] = {}
    for row in data["small_tokens"]:
        cells.setdefault((row["model"], row["keep"], row["tokens"]), {})[row["what"]] = row
    names = list(next(iter(cells.values())))
    lines = [
        (MODELS[model], f"{keep:.0%}", str(tokens),
         *(f"{of[name]['graph_us']:.1f} / {of[name]['eager_us']:.1f}" for name in names))
        for (model, keep, tokens), of in cells.items()
    ]  # fmt: skip
    where = f"{data['gpu']}, torch {data['torch']}, {data['date']}; copy {data['copy_TB_per_s']:.2f} TB/s"
    facts = f"{where}. µs in a graph / µs launched call by call."
    return f"{facts}\n\n" + table(("shapes", "keep", "tokens", *names), lines)


def plot_swiglu(path: Path) -> None:
    """Speed of the masked MLP relative to shrunk cuBLAS over the number of tokens, keep 50 %."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, (model, title) in zip(axes, MODELS.items(), strict=True):
        rows = [r for r in load(f"masked_gemm_{model}_h100.json")["rows"] if r["op"] == "masked_swiglu"]
        rows = [r for r in rows if r["keep"] == 0.5]
        for selection in sorted({r["selection"] for r in rows}):
            points = sorted((r["tokens"], r["times_faster_than_shrunk"]) for r in rows if r["selection"] == selection)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=selection)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="tokens", title=f"{title} MLP, 50 % of the channels")
    axes[0].set_ylabel("speed / shrunk cuBLAS")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def recovery_section(name: str) -> str:
    """Perplexity after recovery training, by method, beside the pruned and the dense model."""
    data = load(name)
    where, protocol = data["environment"], data["protocol"]
    rows = [("dense", "", "", f"{data['dense']:.2f}", ""), ("pruned", "", "", f"{data['pruned']:.2f}", "")]
    for row in data["rows"]:
        settings, seconds = row["settings"], f"{row['training_seconds']:.0f}"
        change = f"{row['perplexity'] / data['pruned'] - 1:+.1%}"
        rows.append(
            (f"{settings['method']}, teacher {settings['distillation']:.0%} of the loss", f"{settings['tokens']:,}",
             seconds, f"{row['perplexity']:.2f}", change)
        )  # fmt: skip
    facts = (
        f"{data['model']}, {data['delivered_ratio']:.0%} of its decoder removed by a fit of "
        f"{data['fit']['evaluations']} evaluations; {protocol['text']}, {protocol['tokens']:,} tokens in sequences of "
        f"{protocol['sequence_length']}. {where['device']}, torch {where['torch']}, {where['date']}"
    )
    note = f"; {where['note']}" if "note" in where else ""
    return f"{facts}{note}.\n\n" + table(("checkpoint", "tokens", "seconds", "perplexity", "change"), rows)


def main() -> None:
    """Write docs/benchmarks.md and its plot."""
    DOCS.mkdir(exist_ok=True)
    plot_swiglu(DOCS / "masked_swiglu.svg")
    text = Path(__file__).with_name("report.head.md").read_text(encoding="utf-8")
    sections = [text, "## Channel gather on a GPU", gather_section("gather_h100.json")]
    sections += ["## Channel gather on a CPU", gather_section("gather_cpu.json")]
    for model, title in MODELS.items():
        sections += [f"## Masked products at {title} shapes", gemm_section(model)]
        if small := small_section(model):
            sections += [f"### {title}: `masked_swiglu` launched from Python, call by call", small]
    sections += ["## The MLP in a graph and call by call", experiments_section()]
    for title, section, prefix in (
        ("Generation", decode_section, "decode"),
        ("Latency budgets", profiling_section, "profiling"),
        ("True evaluations", evaluation_section, "evaluation"),
        ("Predictions", predictor_section, "predictor"),
        ("Libraries", library_section, "library"),
        ("Recovery training", recovery_section, "recover"),
    ):
        for file in sorted(RESULTS.glob(f"{prefix}_*.json")):
            sections += [f"## {title}", section(file.name)]
    (DOCS / "benchmarks.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
