"""Options that several commands share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..storage.locks import wait_for_others

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..model.stream import Placement


def within(least: float, most: float) -> Callable[[typer.CallbackParam, Any], Any]:
    """A callback for a number on the command line: from ``least`` to ``most``, so neither NaN nor infinite. Raises
    ``InputError``. What a command itself knows about its numbers, it says itself."""

    def check(option: typer.CallbackParam, value: Any) -> Any:
        if value is not None and not least <= value <= most:
            whole = "whole " if isinstance(value, int) else ""
            remedy = f"Use a {whole}number from {least:,} to {most:,}"
            raise InputError((option.name or "").replace("_", "-"), _short(value), "is out of range", remedy)
        return value

    return check


def _short(value: float) -> str:
    # Python writes no whole numbers of thousands of digits.
    if isinstance(value, float) or abs(value) < _HUGE:
        return str(value)
    return "a number beyond 1e300" if value > 0 else "a number below -1e300"


_HUGE = 10**300
# More than anybody has time for, and less than what arithmetic of 64 bits holds.
COUNT = within(1, 10**9)
TOKENS = within(1, 10**13)
NUMBER = within(0, 10**6)

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]
Timings = Annotated[bool, typer.Option("--timings", help="Show on standard error where the time went.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: CUDA if there is any.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait", callback=wait_for_others, expose_value=False, help="If another command is writing there, wait for it."
    ),
]
Seed = Annotated[int, typer.Option(callback=within(0, 2**32 - 1), help="Seed of everything random.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `ppf fit --output` made.")]
Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A folder, org/name[@revision] on the hub, or a .gguf file.")
]
TextInput = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        help="Text, .jsonl, .json or .parquet, also .gz or .zst; - for stdin; a dataset's folder or hub id.",
    ),
]
Field = Annotated[str | None, typer.Option(metavar="NAME", help="Of a dataset: the field with text or chat messages.")]
Split = Annotated[str | None, typer.Option(metavar="NAME", help="Of a dataset on the hub or in a folder: train, say.")]
SequenceLength = Annotated[int, typer.Option(callback=COUNT, help="Tokens a sequence; each is scored on its own.")]
Dtype = Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto: the stored one if this device has it.")]
Weights = Annotated[str, typer.Option(help="gpu, or streamed from host or disk; auto: the first with room for them.")]
GpuMemoryGb = Annotated[
    float | None,
    typer.Option(callback=NUMBER, help="Hold no more than so many GB (10⁹ bytes) of a GPU's memory."),
]

Ratio = Annotated[float | None, typer.Option(help="Share of the decoder's parameters to remove, such as 0.3.")]
MemoryGb = Annotated[float | None, typer.Option(help="At most so many GB (10⁹ bytes) of weights, embeddings included.")]
Flops = Annotated[float | None, typer.Option(help="At most so many operations a token, such as 9e9; see --context.")]
Context = Annotated[int, typer.Option(callback=COUNT, help="For --flops: tokens that a token attends to.")]
LatencyMs = Annotated[float | None, typer.Option(help="A prompt in at most so many ms, by the run's `ppf profile`.")]
TokensPerSecond = Annotated[float | None, typer.Option(help="At least so many generated tokens/s, by the profile.")]


def placement(weights: str, gpu_memory_gb: float | None) -> Placement:
    """What --weights and --gpu-memory-gb say. Raises ``InputError`` for what is no place, and no amount of memory."""
    from ..model.stream import Placement

    if gpu_memory_gb is None:
        return Placement(weights)
    if not math.isfinite(gpu_memory_gb):
        raise InputError("gpu-memory-gb", gpu_memory_gb, "is not an amount of memory", "Use a number, such as 12")
    return Placement(weights, int(gpu_memory_gb * 1e9))
