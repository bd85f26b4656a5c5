"""The runtime's logits on a GPU beside the plain path's, both against fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from factories import config_of, llama_config
from runtime_cases import (
    DEVICE,
    FAMILIES,
    dense,
    prompts,
    pruned,
)

from ppf.fast.runtime import generation, loop
from ppf.model.build import build, expected_tensors


def error_ratio(model, batch: int, length: int = 40, steps: int = 32) -> float:
    """Error of the runtime's logits over the plain path's, both against the same weights in fp64: a prefill of prompts
    of different lengths, then steps with given tokens."""
    state = generation.runtime_of(model)
    assert state.obstacle(model) is None
    given = prompts(*(length - 7 * row % (length - 1) for row in range(batch)))
    follow = prompts(*[steps] * batch)["input_ids"]
    ids = torch.cat((given["input_ids"], follow), 1)
    mask = torch.cat((given["attention_mask"], torch.ones_like(follow)), 1)
    with torch.no_grad():
        twin = copy.deepcopy(model).double()
        plain, exact = (
            torch.cat(
                [
                    m(input_ids=i[None], attention_mask=k[None]).logits[:, length - 1 :]
                    for i, k in zip(ids, mask, strict=True)
                ]
            )
            for m in (model, twin)
        )
        session = state.engine.session(state.plan, batch, length + steps)
        session.reset((1 - given["attention_mask"]).sum(1, dtype=torch.int32), [], 0)
        loop.prefill(session, given["input_ids"], batch > 1)
        got = [session.logits.double().clone()]
        for at in range(length, length + steps):
            session.token.copy_(ids[:, at])
            session.advance()
            got.append(session.logits.double().clone())
    return float((torch.stack(got, 1) - exact).norm() / (plain.double() - exact).norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [dense, pruned])
@pytest.mark.parametrize("name", [*FAMILIES, "llama"])
def test_logits_are_as_exact_as_the_plain_path_s(name, make, dtype):
    family, changes = FAMILIES.get(name, (name, {}))
    assert error_ratio(make(dtype=dtype, family=family, **changes), 3) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "kv_heads", "channels"), [(32, 32, 11008), (16, 4, 7168)])
def test_llama_widths(heads, kv_heads, channels):
    """Two layers as wide as a 7B's, and as half an 8B's: the tiles and launches that such models get."""
    config = llama_config(
        hidden_size=4096, intermediate_size=channels, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=128, vocab_size=32000,
    )  # fmt: skip
    state = {
        name: torch.ones(shape, device=DEVICE) if "norm" in name else torch.randn(shape, device=DEVICE) * 0.02
        for name, shape in expected_tensors(config).items()
    }
    model = build(config, state, torch.bfloat16)
    for batch in (1, 4, 16, 40):
        assert error_ratio(model, batch, 60, 8) <= 2, batch


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "heads", "kv_heads", "head_dim"), [
    ("qwen2", 28, 4, 128), ("qwen3", 32, 8, 128), ("mistral", 32, 8, 128), ("qwen3", 16, 8, 64),
])  # fmt: skip
def test_widths_of_other_families(family, heads, kv_heads, head_dim):
    """Two layers as wide as a Qwen2.5-7B's, a Qwen3-8B's, a Mistral's with a window in the text, a small Qwen3's."""
    hidden = heads * head_dim
    config = config_of(
        family, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=32000,
    )  # fmt: skip
    state = {
        name: 1 + 0.1 * torch.randn(shape, device=DEVICE)
        if "norm" in name
        else torch.randn(shape, device=DEVICE) * 0.02
        for name, shape in expected_tensors(config).items()
    }
    model = build(config, state, torch.bfloat16)
    for batch in (1, 4, 40):
        assert error_ratio(model, batch, 60, 8) <= 2, batch
