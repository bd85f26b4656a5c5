"""``ppf export``: a checkpoint for the program that shall run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .console import lines, show
from .options import COUNT, Force, Json, Wait

if TYPE_CHECKING:
    from ..deliver.export import Source

_FORMATS = ("hf", "gguf", "vllm", "deci")
# Options that only one format has, with the value that says they were not given.
_ONLY_FOR = {"dtype": ("gguf", None), "self_contained": ("hf", False), "tensor_parallel": ("vllm", 1)}


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `ppf prune --output` made.")],
    to: Annotated[str, typer.Option(help="hf, gguf, vllm or deci.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the export.")],
    dtype: Annotated[str | None, typer.Option(help="gguf: f32, f16 (default), bf16 or q8_0.")] = None,
    self_contained: Annotated[
        bool, typer.Option("--self-contained", help="hf: add the modelling code, for readers without ppf.")
    ] = False,
    tensor_parallel: Annotated[
        int, typer.Option(callback=COUNT, metavar="N", help="vllm: GPUs that shall share it.")
    ] = 1,
    force: Force = False,
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint for transformers, llama.cpp, vLLM or readers of DeciLM; says first what they would refuse."""
    from ..deliver.export import open_source

    options = {"dtype": dtype, "self_contained": self_contained, "tensor_parallel": tensor_parallel}
    _require_fitting(to, options)
    source = open_source(checkpoint)
    data = {"output": str(output)} | _write(source, output, to, options, force)
    facts = {name.replace("_", " "): value for name, value in data.items()}
    show(as_json, data, lines(facts), f"Next: {_opened_by(source, output, data)}")


def _require_fitting(to: str, options: dict[str, Any]) -> None:
    if to not in _FORMATS:
        raise InputError("to", to, "is no format PPF writes", f"Use one of {list(_FORMATS)}")
    for name, (own, absent) in _ONLY_FOR.items():
        if options[name] != absent and to != own:
            raise InputError(name.replace("_", "-"), options[name], f"makes no sense with --to {to}", "Drop it")


def _write(source: Source, output: Path, to: str, options: dict[str, Any], force: bool) -> dict[str, Any]:
    from ..deliver import export as formats

    if to == "gguf":
        return formats.to_gguf(source, output, options["dtype"] or "f16", force)
    if to == "vllm":
        return formats.to_vllm(source, output, options["tensor_parallel"], force)
    if to == "deci":
        return formats.to_deci(source, output, force)
    return formats.to_hf(source, output, options["self_contained"], force)


def _opened_by(source: Source, output: Path, facts: dict[str, Any]) -> str:
    """How to open what was written."""
    where = "" if source.is_uniform else ", where ppf is installed"
    if facts["format"] == "gguf":
        return f"llama-cli -m {output / facts['file']}"
    if facts["format"] == "vllm":
        count = facts["tensor_parallel"]
        return f"vllm serve {output}" + f" --tensor-parallel-size {count}" * (count > 1) + where
    if facts["format"] == "deci":
        return f"vllm serve {output} --trust-remote-code (its configuration class lies in the folder)"
    auto = "AutoModelForImageTextToText" if source.is_tower else "AutoModelForCausalLM"
    option = ", trust_remote_code=True" * facts["self_contained"]
    return f'{auto}.from_pretrained("{output}"{option})' + where * (not option)
