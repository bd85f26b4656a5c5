"""Which formats a checkpoint can be exported to, without writing any."""

from __future__ import annotations

from ...errors import InputError
from .deci import deci_config
from .gguf_tokenizer import vocabulary
from .gguf_weights import rope_factors, written_widths
from .source import Source
from .vllm import require_servable


def routes(source: Source) -> dict[str, str | None]:
    """For each format, why its readers would refuse ``source``, or None if they accept it (vLLM: on one GPU)."""
    return {"hf": None} | {name: _problem(check, source) for name, check in _CHECKS.items()}


def _gguf(source: Source) -> None:
    written_widths(source)
    rope_factors(source.config, source.head_dim)
    vocabulary(source.tokenizer, source.config)


_CHECKS = {"gguf": _gguf, "vllm": lambda source: require_servable(source, 1), "deci": deci_config}


def _problem(check, source: Source) -> str | None:
    try:
        check(source)
    except InputError as error:
        return f"{error.field} = {error.value}: {error.problem}"
    return None
