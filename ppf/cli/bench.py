"""``ppf bench``: how fast a checkpoint, or a run at several sizes, reads and generates here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .console import errors, show
from .options import COUNT, Device, Dtype, Json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from ..fast.runtime.benchmark import Row

# Stock transformers: as it comes, and with a static cache and torch.compile.
_NAMES = {"ppf": "ppf", "eager": "stock", "compiled": "compiled"}


def bench(
    model: Annotated[Path, typer.Argument(metavar="MODEL|RUN", help="A checkpoint, or a folder of `ppf fit`.")],
    ratios: Annotated[str, typer.Option(help="Of a RUN: ratios to measure, such as 0,0.3,0.5.")] = "0,0.5",
    batches: Annotated[str, typer.Option(help="Numbers of sequences, 1 to 64.")] = "1",
    prompt: Annotated[
        int, typer.Option(callback=COUNT, help="Tokens of the prompt that generation starts from.")
    ] = 128,
    new_tokens: Annotated[int, typer.Option(callback=COUNT, help="Tokens to generate.")] = 128,
    prefill: Annotated[int, typer.Option(callback=COUNT, help="Tokens of the prompt whose reading is measured.")] = 512,
    runners: Annotated[str, typer.Option(help="Of ppf, eager, compiled (compiling takes a minute).")] = "ppf,eager",
    device: Device = "auto",
    dtype: Dtype = "auto",
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the result (.svg, .png or .pdf).")] = None,
    as_json: Json = False,
) -> None:
    """Prefill and decode: tokens/s, GB/s, share of the physical limit, memory, beside stock transformers."""
    from ..fast.runtime.benchmark import RUNNERS, rows_as_dicts

    chosen = _list("runners", runners, lambda name: name in RUNNERS, f"Use some of {', '.join(RUNNERS)}")
    sizes = [int(n) for n in _list("batches", batches, _is_batch, "Use whole numbers from 1 to 64, such as 1,16")]
    for name, value, least in (("prompt", prompt, 1), ("new-tokens", new_tokens, 2), ("prefill", prefill, 1)):
        if value < least:
            raise InputError(name, value, "is too few", f"Use at least {least}")
    _list("ratios", ratios, _is_ratio, "Use shares such as 0,0.3,0.5")
    _check_plot(plot)
    facts, rows = _measure(model, ratios, sizes, prompt, new_tokens, prefill, chosen, device, dtype)
    if plot is not None:
        _draw(rows, plot)
    show(as_json, {**facts, "rows": rows_as_dicts(rows)}, _header(facts), _table(rows))


def _measure(
    path: Path, ratios: str, batches: list[int], prompt: int, new_tokens: int, prefill: int, runners: list[str],
    device: str, dtype: str,
) -> tuple[dict[str, Any], list[Row]]:  # fmt: skip
    import torch

    from .._version import versions
    from ..fast.runtime.benchmark import decode_row, measure_ceilings, prefill_row

    rows, ceilings, where = [], None, {}
    for ratio, loaded in _models(path, ratios, device, dtype):
        _check_context(loaded, max(prompt + new_tokens, prefill + 1))
        if ceilings is None:
            ceilings = measure_ceilings(loaded.device, loaded.dtype)
            cuda = loaded.device.type == "cuda"
            where = {
                "model": str(path),
                "device": torch.cuda.get_device_name(loaded.device)
                if cuda
                else f"CPU, {torch.get_num_threads()} threads",
                "dtype": str(loaded.dtype).removeprefix("torch."),
                "copy_gigabytes_per_second": ceilings.bytes_per_second / 1e9,
                "product_teraflops": ceilings.operations_per_second / 1e12,
                "versions": versions(),
            }
        for batch in batches:
            for runner in runners:
                errors.print(f"ratio {ratio:g}, batch {batch}, {_NAMES[runner]} …", style="dim", highlight=False)
                rows.append(prefill_row(loaded, runner, batch, prefill, ceilings, ratio))
                rows.append(decode_row(loaded, runner, batch, prompt, new_tokens, ceilings, ratio))
    return where, rows


def _models(path: Path, ratios: str, device: str, dtype: str) -> Iterator[tuple[float, Any]]:
    """(ratio, model): one checkpoint, or an elastic model set to one ratio after the other."""
    from ..checkpoint import resolve_device
    from ..deliver.elastic.loading import load

    if not (path / "run.json").is_file():
        from ..fitting.perplexity import load_for_computing

        yield 0.0, load_for_computing(path, device, dtype)
        return
    wanted = [float(r) for r in _list("ratios", ratios, _is_ratio, "Use shares such as 0,0.3,0.5")]
    model = load(path, str(resolve_device(device)), dtype, elastic=True)
    for ratio in wanted:
        model.set_ratio(ratio)
        yield ratio, model


def _list(field: str, text: str, fits: Any, remedy: str) -> list[str]:
    """The items of a comma-separated option, each of which must fit."""
    items = [item.strip() for item in text.split(",")]
    for item in items:
        if not fits(item):
            raise InputError(field, item or "an empty item", "does not fit here", remedy)
    return items


def _is_batch(text: str) -> bool:
    return text.isdecimal() and len(text) <= 2 and 1 <= int(text) <= 64


def _is_ratio(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False


def _check_context(model: Any, length: int) -> None:
    context = model.config.max_position_embeddings
    if length > context:
        problem = f"is more than the model's context of {context}"
        raise InputError("prompt, new-tokens, prefill", length, problem, "Use fewer tokens")


def _check_plot(plot: Path | None) -> None:
    """Before minutes of measuring: is there matplotlib, and can the file be written?"""
    if plot is None:
        return
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise InputError("plot", plot, "needs matplotlib", "Run: pip install 'ppf[lab]', or leave --plot out") from None
    if plot.suffix not in (".svg", ".png", ".pdf") or not plot.parent.is_dir():
        raise InputError(
            "plot", plot, "is not a file to draw to", "Use a name in an existing folder, ending in .svg or .png"
        )


def _header(facts: dict[str, Any]) -> str:
    bandwidth, product = facts["copy_gigabytes_per_second"], facts["product_teraflops"]
    return (
        f"{facts['device']}, {facts['dtype']}; measured here: copy {bandwidth:,.0f} GB/s, "
        f"product {product:,.2f} TFLOP/s (limits of decode and prefill)"
        + ("; on a CPU ppf generates as stock does" if facts["device"].startswith("CPU") else "")
    )


def _table(rows: list[Row]) -> Table:
    from rich.table import Table

    titles = "measured", "runner", "ratio", "batch", "ms", "tokens/s", "GB/s", "of limit", "peak GB"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        table.add_column(title, no_wrap=True, justify="left" if title in titles[:2] else "right")
    for row in rows:
        tokens = f"{row.prompt}" if row.phase == "prefill" else f"{row.prompt}+{row.new_tokens}"
        table.add_row(
            f"{row.phase} {tokens}", _NAMES[row.runner], f"{row.ratio:g}", str(row.batch), f"{row.milliseconds:.3f}",
            f"{row.tokens_per_second:,.1f}", f"{row.gigabytes_per_second:,.1f}", f"{row.share_of_limit:.1%}",
            f"{row.peak_gigabytes:.2f}",
        )  # fmt: skip
    return table


def _draw(rows: list[Row], path: Path) -> None:
    """Tokens per second of every runner over the ratio, one panel a phase and batch; dashed: the physical limit."""
    from matplotlib.figure import Figure

    from ..storage.files import write_atomically

    panels = sorted({(row.phase, row.batch) for row in rows})
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axis, (phase, batch) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        here = [row for row in rows if (row.phase, row.batch) == (phase, batch)]
        for runner in dict.fromkeys(row.runner for row in here):
            points = sorted((row.ratio, row.tokens_per_second) for row in here if row.runner == runner)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=_NAMES[runner])
        limits = sorted({(row.ratio, row.tokens_per_second / row.share_of_limit) for row in here})
        axis.plot(*zip(*limits, strict=True), linestyle="--", color="grey", label="physical limit")
        axis.set(title=f"{phase}, batch {batch}", xlabel="parameters removed", ylabel="tokens/s", ylim=(0, None))
        axis.legend(fontsize=7)
    kind = path.suffix.removeprefix(".")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind))
