"""The arithmetic on plain tensors against transformers' modules."""

import pytest
import torch
import torch.nn.functional as F
from factories import VOCABULARY, dense_weights, tokens

from ppf.fast import forward
from ppf.fast.forward import attention_inner, ffn_inner, norm, rope, token_losses

pytestmark = pytest.mark.usefixtures("one_thread")


def capture(module) -> dict[str, torch.Tensor]:
    """The module's first input (as "x") and output (as "y") of its next call."""
    seen = {}

    def hook(_, arguments, keywords, output):
        seen["x"] = arguments[0] if arguments else keywords["hidden_states"]
        seen["y"] = output

    module.register_forward_hook(hook, with_kwargs=True)
    return seen


@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_inner_activations_equal_transformers(heads):
    model, weights = dense_weights(heads)
    s, layer, block = weights.structure, weights.layers[2], model.model.layers[2]
    attention, ffn = capture(block.self_attn), capture(block.mlp)
    before = {n: capture(m) for n, m in (("o", block.self_attn.o_proj), ("down", block.mlp.down_proj))}
    normed = capture(block.input_layernorm)
    ids = tokens()
    with torch.no_grad():
        model(ids)
    torch.testing.assert_close(norm(normed["x"], layer.attention_norm, weights.epsilon), normed["y"])
    inner = attention_inner(attention["x"], layer, s, rope(weights, ids.shape[1]), s.kv_groups)
    torch.testing.assert_close(inner, before["o"]["x"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ffn_inner(ffn["x"], layer, s.channels), before["down"]["x"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", ["mha", "gqa"])
def test_a_width_is_a_prefix_of_the_full_activations(heads):
    _, weights = dense_weights(heads)
    s, layer, cos_sin = weights.structure, weights.layers[0], rope(weights, 24)
    x = torch.randn(2, 24, s.hidden)
    full = attention_inner(x, layer, s, cos_sin, s.kv_groups)
    for width in range(s.kv_groups + 1):
        part = attention_inner(x, layer, s, cos_sin, width)
        torch.testing.assert_close(part, full[..., : width * s.group_rows], rtol=1e-5, atol=1e-6)
    full = ffn_inner(x, layer, s.channels)
    for width in (0, 1, 17, 64):
        torch.testing.assert_close(ffn_inner(x, layer, width), full[..., :width], rtol=1e-5, atol=1e-6)


def test_attention_is_causal():
    _, weights = dense_weights()
    s, layer, cos_sin = weights.structure, weights.layers[0], rope(weights, 24)
    x = torch.randn(1, 24, s.hidden)
    changed = x.clone()
    changed[:, 10] += 1
    a, b = (attention_inner(t, layer, s, cos_sin, s.kv_groups) for t in (x, changed))
    assert torch.equal(a[:, :10], b[:, :10]) and not torch.allclose(a[:, 11:], b[:, 11:])


@pytest.mark.parametrize("tokens_at_once", [1, 7, 2048])
def test_losses_are_those_of_the_logits_whatever_the_block(monkeypatch, tokens_at_once):
    monkeypatch.setitem(forward._LOGIT_BYTES, "cpu", tokens_at_once * 4 * VOCABULARY)
    model, weights = dense_weights()
    ids = tokens(3, 24)
    with torch.no_grad():
        hidden = capture(model.model.norm)
        logits = model(ids).logits
        losses = token_losses(weights, hidden["x"], ids)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="none")
    assert losses.shape == (3, 23) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.flatten().double(), expected, rtol=1e-5, atol=1e-5)
