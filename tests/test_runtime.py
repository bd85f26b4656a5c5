"""The runtime's loop, prefill and caches against transformers' plain generation. On a CPU the ops are the references."""

from __future__ import annotations

import warnings

import pytest
import torch
from factories import llama, llama_config
from transformers import GenerationConfig, GenerationMixin, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import ppf
from ppf.models import build, pruned_config
from ppf.models.layout import expected_tensors
from ppf.policy import Policy
from ppf.runtime import generation, loop

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICY = Policy([3, 0, 1, 0], [64, 24, 0, 40])  # absent sub-layers, and none of the last layers has attention


@pytest.fixture(autouse=True)
def served(monkeypatch, one_thread):
    """Requests that the runtime has served, as lists; a CPU is taken for a device that it serves."""
    if DEVICE == "cpu":
        monkeypatch.setattr(generation, "_where", lambda model: None)
    calls, run = [], loop.run
    monkeypatch.setattr(generation, "run", lambda *a: calls.append(a[1].ids.tolist()) or run(*a))
    return calls


def pruned(policy: Policy = POLICY, dtype: torch.dtype = torch.float32, **changes):
    config = pruned_config(llama_config(**changes), policy)
    source = llama(llama_config(**changes)).state_dict()
    state = {
        name: source[name][tuple(slice(n) for n in shape)].clone() for name, shape in expected_tensors(config).items()
    }
    return build(config, state, dtype).to(DEVICE)


def dense(dtype: torch.dtype = torch.float32, **changes):
    return llama(llama_config(**changes), dtype=dtype).to(DEVICE)


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Random prompts, padded on the left with token 0."""
    longest = max(lengths)
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(1, 256, (len(lengths), longest), generator=generator)
    mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
    return {"input_ids": (ids * mask).to(DEVICE), "attention_mask": mask.to(DEVICE)}


def plain(model, **kwargs) -> torch.Tensor:
    return GenerationMixin.generate(model, **kwargs)


def both(model, seed: int = 0, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    results = []
    for generate in (ppf.accelerate(model).generate, lambda **k: plain(model, **k)):
        torch.manual_seed(seed)
        results.append(generate(**kwargs))
    return tuple(results)


@pytest.mark.parametrize("make", [dense, pruned])
@pytest.mark.parametrize("heads", ["mha", "gqa"])
@pytest.mark.parametrize("lengths", [(5,), (7, 1, 4), (1,)])
def test_greedy_tokens_are_the_plain_path_s(make, heads, lengths, served):
    model = make(heads=heads)
    got, wanted = both(model, **prompts(*lengths), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(got, wanted) and len(served) == 1
