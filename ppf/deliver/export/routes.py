"""Which formats a checkpoint can be exported to, without writing any."""

from __future__ import annotations

from ...errors import InputError
from .deci import deci_config
from .gguf_file import require_runnable
from .source import Source
from .vllm import require_servable


def routes(source: Source) -> dict[str, str | None]:
    """For each format, why its readers would refuse ``source``, or None if they accept it (vLLM: on one GPU)."""
    return {"hf": None} | {name: _problem(check, source) for name, check in _CHECKS.items()}


_CHECKS = {"gguf": require_runnable, "vllm": lambda source: require_servable(source, 1), "deci": deci_config}


def _problem(check, source: Source) -> str | None:
    try:
        check(source)
    except InputError as error:
        return f"{error.field} = {error.value}: {error.problem}"
    return None
