"""Turns benchmarks/results/*.json into docs/benchmarks.md and the tables of docs/families.md and docs/large-models.md.

Run it after every new measurement:

    python benchmarks/report.py
"""

from __future__ import annotations

from pathlib import Path

from report_families import fill_families
from report_scale import fill_scale
from report_speed import decode_section, predictor_section, profiling_section
from tables import DOCS, RESULTS, load, table


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
        f"perplexities of {precision['policies']} policies of {rows[0]['model']} are within "
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
        f"{large['peak_GB_with_solutions']:.1f} GB with all solutions."
    )
    protocol = (
        "Perplexity of uniform policies of ref-14m (49,152 tokens of WikiText-2's validation set, sequences of 512) by "
        "ranking: with the refit, masked with FLAP's biases, masked."
    )
    titles = ("ranking", *(kind.replace("_", " ") for kind in kinds))
    parts = facts, sizes, table(("stage", "seconds", "limit"), stages), protocol, table(titles, quality)
    return "\n\n".join(parts)


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
    """Write docs/benchmarks.md, and the tables of docs/families.md and docs/large-models.md."""
    fill_families()
    fill_scale()
    text = Path(__file__).with_name("report.head.md").read_text(encoding="utf-8")
    sections = [text, "## Channel gather on a GPU", gather_section("gather_h100.json")]
    sections += ["## Channel gather on a CPU", gather_section("gather_cpu.json")]
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
