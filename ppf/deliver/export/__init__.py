"""Exports: one result of PPF, written for the program that shall run it.

``to_hf`` for transformers, ``to_gguf`` for llama.cpp, ``to_vllm`` for vLLM with PPF's plugin, ``to_deci`` for readers
of Nemotron-NAS. Each takes an opened :class:`Source`, refuses what its reader could not load before anything is
written, and leaves a complete folder or nothing. docs/formats.md says which program opens what.
"""

from .deci import to_deci
from .gguf_file import to_gguf
from .hf import to_hf
from .source import Source, open_source
from .vllm import to_vllm

__all__ = ["Source", "open_source", "to_deci", "to_gguf", "to_hf", "to_vllm"]
