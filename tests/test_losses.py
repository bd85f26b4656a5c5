"""Token losses of every family, a block of logits at a time, against transformers' logits."""

import pytest
import torch
import torch.nn.functional as F
from factories import VOCABULARY, dense_weights, tokens

from ppf.families import families
from ppf.fast import losses as module
from ppf.fast.losses import head_losses, logits, token_losses

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = tokens(3, 24)


def last_hidden(model) -> tuple[torch.Tensor, torch.Tensor]:
    """What the last norm of ``model`` is given for :data:`IDS`, and the logits."""
    seen = {}
    handle = model.model.norm.register_forward_hook(lambda _, inputs, __: seen.update(x=inputs[0]))
    with torch.no_grad():
        found = model(IDS).logits
    handle.remove()
    return seen["x"], found


def exact(found: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(found[:, :-1].flatten(0, 1).double(), IDS[:, 1:].flatten(), reduction="none").view(3, 23)


@pytest.mark.parametrize("family", [f.model_type for f in families()])
def test_losses_are_those_of_transformers_logits(family):
    """Gemma 2 caps them, Granite divides them, Gemma's norm adds one to its weight."""
    model, decoder = dense_weights(family=family)
    hidden, found = last_hidden(model)
    frame = decoder.frame
    ours = token_losses(frame, hidden, IDS)
    assert ours.shape == (3, 23) and ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact(found), rtol=1e-5, atol=1e-5)
    normed = model.model.norm(hidden).detach()
    torch.testing.assert_close(logits(normed, frame.head, frame.scale, frame.cap), found, rtol=1e-5, atol=1e-5)
    assert (frame.cap is not None, frame.scale != 1.0) == (family == "gemma2", family == "granite")
    # Negative control: left out, either shows.
    plain = head_losses(normed, frame.head, IDS)
    off = float((plain.double() - exact(found)).abs().max())
    assert off > 1e-2 if family in ("gemma2", "granite") else off < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("tokens_at_once", [1, 7, 2048])
def test_losses_do_not_depend_on_the_block(monkeypatch, family, tokens_at_once):
    monkeypatch.setitem(module._LOGIT_BYTES, "cpu", tokens_at_once * 4 * VOCABULARY)
    monkeypatch.setattr(module, "_LEAST_BLOCK", 1)
    model, decoder = dense_weights(family=family)
    hidden, found = last_hidden(model)
    assert module.logit_block(decoder.frame.head) == tokens_at_once
    ours = token_losses(decoder.frame, hidden, IDS)
    torch.testing.assert_close(ours.double(), exact(found), rtol=1e-5, atol=1e-5)


def test_a_large_vocabulary_is_not_read_for_a_few_tokens_only():
    assert module.logit_block(torch.empty(1024, 0)) == 1024  # 4 MiB
    assert module.logit_block(torch.empty(10**7, 0)) == 256


def test_half_precision_losses_are_fp32():
    _, decoder = dense_weights()
    hidden, _ = last_hidden(dense_weights()[0])
    full = token_losses(decoder.frame, hidden, IDS)
    half = token_losses(decoder.to(torch.bfloat16).frame, hidden.bfloat16(), IDS)
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.05 * full.mean()


@pytest.mark.gpu
@pytest.mark.parametrize("scale, cap", [(1.0, None), (4.0, None), (1.0, 3.0)])
def test_losses_without_logits_in_memory_are_as_exact(scale, cap):
    """In bf16 on a GPU, against the way that a gradient takes, which writes logits."""
    normed, head = torch.randn(3, 24, 64).bfloat16(), (0.3 * torch.randn(300, 64)).bfloat16()
    wanted = exact(logits(normed.double(), head.double(), scale, cap))
    ids = IDS.cuda()
    fused = head_losses(normed.cuda(), head.cuda(), ids, scale, cap)
    written = head_losses(normed.cuda().requires_grad_(), head.cuda(), ids, scale, cap).detach()
    assert fused.shape == written.shape and fused.dtype == written.dtype == torch.float32
    wrong = [float((found.cpu().double() - wanted).norm()) for found in (fused, written)]
    assert wrong[0] <= 2 * max(wrong[1], 1e-3 * float(wanted.norm())) and not torch.equal(fused, written)
