"""What the paths with kernels of their own ask of a model before they take it: each reason is the end of a sentence."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..families.traits import activation, unserved
from ..model.decoder import Decoder
from .ops import dispatch


def foreign_arithmetic(decoder: Decoder, serves: frozenset[str], activations: Collection[str]) -> str | None:
    """Why a path that computes the traits ``serves`` and the ``activations`` cannot run the model; None if it can."""
    if reason := unserved(decoder.traits, serves):
        return reason
    if (name := activation(decoder.config)) not in activations:
        return f"its activation is {name}, not one of {', '.join(activations)}"
    if set(decoder.family.attention.head_norms) not in (set(), {"query", "key"}):
        return "it normalises other heads than those of queries and keys"
    # Masks are read to find windows, and the other ways of computing attention are not given any.
    if decoder.frame.attention not in ("sdpa", "eager"):
        return f"its attention is computed by {decoder.frame.attention}, whose windows show in no mask"
    if any(sublayer.step != 1 for sublayer in decoder.structure.attention):
        return "its kv-groups do not go one by one"
    return None


def foreign_device(decoder: Decoder, shared_bytes: int) -> str | None:
    """Why kernels of which a program keeps ``shared_bytes`` in shared memory cannot run where the weights are."""
    if decoder.device.type != "cuda" or not dispatch.kernels_apply(decoder.frame.head):
        return "it is not on a GPU in 16 bits, with Triton"
    memory = torch.cuda.get_device_properties(decoder.device).shared_memory_per_block_optin
    return f"the GPU has {memory // 1024} KB of shared memory a program" if memory < shared_bytes else None
