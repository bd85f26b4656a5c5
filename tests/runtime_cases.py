"""What tests of the runtime share: models it serves, prompts, and the comparison with transformers' own generation."""

from __future__ import annotations

import pytest
import torch
from factories import model_of
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.streamers import BaseStreamer

import ppf
from ppf.families import family_of
from ppf.fast.runtime import generation, loop
from ppf.model.build import build, expected_tensors, pruned_config
from ppf.model.geometry import structure_of
from ppf.model.policy import Policy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICY = Policy([3, 0, 1, 0], [64, 24, 0, 40])  # absent sub-layers, and the last layers have no attention
GREEDY = {"do_sample": False, "pad_token_id": 0}
SAMPLE = {"do_sample": True, "temperature": 0.8, "top_k": 20, "pad_token_id": 0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
PLAIN_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
FAMILIES = {  # by name: a family, and what else is special
    "llama with all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", WINDOWS),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases and windows": ("qwen3", WINDOWS | {"attention_bias": True}),
    "phi3": ("phi3", {"rope_parameters": PLAIN_ROTARY, "sliding_window": 13}),
}


def requests_served(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Results of the requests that the runtime has served; a CPU is taken for a device that it serves."""
    if DEVICE == "cpu":
        monkeypatch.setattr(generation, "_where", lambda model: None)
    results, run = [], loop.run

    def spied(session, request):
        results.append(run(session, request))
        return results[-1]

    monkeypatch.setattr(generation, "run", spied)
    return results


def shrunk(model, policy: Policy):
    """``model`` with some of its weights, in the shapes of ``policy``."""
    config, source = pruned_config(model.config, policy), model.state_dict()
    shapes = expected_tensors(config).items()
    state = {name: source[name][tuple(slice(n) for n in shape)].clone() for name, shape in shapes}
    return build(config, state, model.dtype, model.generation_config)


def pruned(policy: Policy = POLICY, dtype: torch.dtype = torch.float32, family: str = "llama", **changes):
    return ppf.accelerate(shrunk(model_of(family, dtype=dtype, **changes), policy).to(DEVICE))


def dense(dtype: torch.dtype = torch.float32, family: str = "llama", **changes):
    return ppf.accelerate(model_of(family, dtype=dtype, **changes).to(DEVICE))


def uneven(model):
    """``model`` with the leading units of every layer, fewer in every second one, and no FFN in layer 1."""
    s = structure_of(family_of(model.config.model_type), model.config)
    groups = [sublayer.units // (1 + index % 2) for index, sublayer in enumerate(s.attention)]
    channels = [0 if index == 1 else sublayer.units // (1 + index % 3) for index, sublayer in enumerate(s.ffn)]
    return ppf.accelerate(shrunk(model, Policy(groups, channels)))


def prompts(*lengths: int) -> dict[str, Tensor]:
    """Random prompts, padded on the left with token 0."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(1, 256, (len(lengths), longest), generator=generator)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    return {"input_ids": (ids * mask).to(DEVICE), "attention_mask": mask.to(DEVICE)}


def both(model, **kwargs) -> tuple[Tensor, Tensor]:
    """What the model's generate() returns, and the plain path's; streamers and criteria are given to both."""
    results = []
    for generate in (model.generate, lambda **k: GenerationMixin.generate(model, **k)):
        torch.manual_seed(3)
        results.append(generate(**kwargs))
    return tuple(results)


def end_of(model, inputs: dict[str, Tensor], at: int, **kwargs) -> int:
    """A token that the model generates as number ``at``: as the end of a sequence, it stops there."""
    length = inputs["input_ids"].shape[1]
    torch.manual_seed(3)
    return int(
        GenerationMixin.generate(model, **inputs, max_new_tokens=at + 1, eos_token_id=None, **kwargs)[0, length + at]
    )


class Record(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.flatten().tolist())

    def end(self):
        self.seen.append("end")
