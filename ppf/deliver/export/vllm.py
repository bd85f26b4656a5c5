"""vLLM: what it will refuse, said before it is served, and a folder that it opens, with PPF's plugin where need be.

``pip install ppf`` beside vLLM registers the model class (ppf/deliver/export/vllm_plugin.py); the folder itself is the
Hugging Face one, with the answer of the check in its report. Uniform results are vLLM's own models of their families.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import InputError
from ...families.traits import unserved
from ...model.geometry import head_dim_of
from .hf import write_copy
from .source import Source, check_destination
from .vllm_plugin import SERVED

_SIZES = (1, 2, 4, 8, 16)
_BY_HIDDEN_SIZE = ("qwen2",)
_REMEDY = "Export to hf or gguf, or prune with the same widths in all layers"


def to_vllm(source: Source, output: str | Path, tensor_parallel: int = 1, force: bool = False) -> dict[str, Any]:
    """Write ``source`` for ``vllm serve``; returns what ``ppf.json`` says about the export.

    Raises ``InputError``, before anything is written, for what vLLM would refuse on ``tensor_parallel`` GPUs.
    """
    check_destination(source, output, force)
    require_servable(source, tensor_parallel)
    fits = [size for size in _SIZES if tensor_parallel_problem(source, size) is None]
    facts = {"format": "vllm", "tensor_parallel": tensor_parallel, "tensor_parallel_sizes": fits}
    return write_copy(source, output, facts, force)


def require_servable(source: Source, tensor_parallel: int) -> None:
    """Raise ``InputError`` for layers of different widths in a family that the plugin does not serve, for a uniform
    result that vLLM's own model would misread, and for widths that so many GPUs cannot share evenly."""
    if tensor_parallel < 1:
        raise InputError("tensor-parallel", tensor_parallel, "is no number of GPUs", "Use a whole number, at least 1")
    if source.is_uniform:
        _require_own(source)
    else:
        _require_served(source)
    problem = tensor_parallel_problem(source, tensor_parallel)
    if problem:
        fits = [size for size in _SIZES if tensor_parallel_problem(source, size) is None]
        raise InputError("tensor-parallel", tensor_parallel, problem, f"This checkpoint fits {fits}")


def _require_own(source: Source) -> None:
    """Uniform results are vLLM's own models, some of which do not look at ``head_dim``."""
    config, heads = source.config, source.widths[0][0]
    if config.model_type in _BY_HIDDEN_SIZE and heads * head_dim_of(config) != config.hidden_size:
        problem = f"vLLM's own {config.model_type} takes the hidden size over the {heads} heads for the head size"
        raise InputError("attention heads", heads, problem, "Keep all heads, or prune with widths that differ")


def _require_served(source: Source) -> None:
    problem = None
    if source.is_tower or source.config.model_type not in SERVED:
        problem = f"PPF's plugin for vLLM serves layers of different widths of {', '.join(SERVED)} only"
    elif reason := unserved(source.traits, ()):
        problem = f"PPF's plugin for vLLM cannot run it: {reason}"
    if problem:
        raise InputError("architecture", source.config.model_type, problem, _REMEDY)


def tensor_parallel_problem(source: Source, size: int) -> str | None:
    """Why ``size`` GPUs cannot share the layers evenly, or None. Fewer kv heads than GPUs are copied, if evenly."""
    for index, (heads, kv_heads, channels) in enumerate(source.widths):
        if heads % size:
            return f"layer {index} has {heads} query heads"
        if kv_heads and (kv_heads % size if kv_heads >= size else size % kv_heads):
            return f"layer {index} has {kv_heads} key/value heads"
        if channels % size:
            return f"layer {index} has {channels} FFN channels"
    return None
