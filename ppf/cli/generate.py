"""``ppf generate``: let a checkpoint go on with a prompt."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .console import show
from .options import COUNT, Device, Dtype, Json, Model, Seed

if TYPE_CHECKING:
    from pathlib import Path

# Beyond them single precision has nothing left to choose from.
_COLDEST, _HOTTEST = 1e-4, 1e4


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on with.")],
    max_new_tokens: Annotated[int, typer.Option(callback=COUNT, help="At most so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Let a dense or pruned checkpoint go on with a prompt."""
    if not prompt.strip():
        raise InputError("prompt", repr(prompt), "is empty", "Give some text to go on with")
    if max_new_tokens < 1:
        raise InputError("max-new-tokens", max_new_tokens, "asks for nothing", "Use a whole number, at least 1")
    if temperature != 0 and not _COLDEST <= temperature <= _HOTTEST:
        remedy = f"Use 0, or a number from {_COLDEST} to {_HOTTEST}, such as 0.8"
        raise InputError("temperature", temperature, "is not a temperature", remedy)
    data = _generate(model, prompt, max_new_tokens, temperature, seed, device, dtype)
    show(as_json, data, data["text"])


def _generate(
    model: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int, device: str, dtype: str
) -> dict[str, Any]:
    import torch

    from ..checkpoint import load_tokenizer
    from ..families import family_of
    from ..fast.runtime.generation import generate as run
    from ..fitting.perplexity import load_for_computing
    from ..text import begin_token

    tokenizer, loaded = load_tokenizer(model), load_for_computing(model, device, dtype)
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    begin = begin_token(family_of(loaded.config.model_type), tokenizer)
    if begin is not None and ids[:1] != [begin]:
        ids = [begin, *ids]
    inputs = torch.tensor([ids], device=loaded.device)
    given, context = inputs.shape[1], loaded.config.max_position_embeddings
    if given + max_new_tokens > context:
        problem = f"with the prompt's {given} tokens is more than the model's context of {context}"
        raise InputError("max-new-tokens", max_new_tokens, problem, "Use fewer, or a shorter prompt")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    start = time.perf_counter()
    output = run(
        loaded,
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
        **sampling,
    )
    seconds = time.perf_counter() - start
    tokens = output.shape[1] - given
    return {
        "prompt": prompt,
        "text": tokenizer.decode(output[0], skip_special_tokens=True),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
