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
