"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on standard output.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto: CUDA if there is any.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `ppf fit --output` made.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a Hugging Face checkpoint.")]
TextFile = Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text file.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens a sequence; each is scored on its own.")]
Dtype = Annotated[str, typer.Option(help="float32, float16, bfloat16, or auto: the stored one if this device has it.")]

Ratio = Annotated[float | None, typer.Option(help="Share of the decoder's parameters to remove, such as 0.3.")]
MemoryGb = Annotated[float | None, typer.Option(help="At most so many GB (10⁹ bytes) of weights, embeddings included.")]
Flops = Annotated[float | None, typer.Option(help="At most so many operations a token, such as 9e9; see --context.")]
Context = Annotated[int, typer.Option(help="For --flops: tokens that a token attends to.")]
LatencyMs = Annotated[float | None, typer.Option(help="A prompt in at most so many ms, by the run's `ppf profile`.")]
TokensPerSecond = Annotated[float | None, typer.Option(help="At least so many generated tokens/s, by the profile.")]
