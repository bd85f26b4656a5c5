"""Calibration statistics against hooks on the Hugging Face model."""

import pytest
import torch
from factories import dense_weights, llama, llama_config, random_ranking, tokens, track_grams

from ppf.fitting.calibration import calibrate
from ppf.model.weights import DecoderWeights
from ppf.text import BATCH_TOKENS

pytestmark = pytest.mark.usefixtures("one_thread")


def hooked_inputs(model, sequences) -> dict[str, torch.Tensor]:
    """Inputs fp64 [tokens, n] of every output projection, by module name."""
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].flatten(0, -2).double()}))
    with torch.no_grad():
        model(sequences)
    return seen


@pytest.mark.parametrize("heads", ["mha", "gqa"])
@pytest.mark.parametrize("tied", [False, True])
def test_statistics_are_those_of_the_model(heads, tied):
    model, weights = dense_weights(heads, tie_word_embeddings=tied)
    sequences = tokens(5, 30)
    inputs = hooked_inputs(model, sequences)
    found = list(calibrate(weights, sequences))
    assert len(found) == 4
    for index, layer in enumerate(found):
        for name, part in (("self_attn.o_proj", layer.attention), ("mlp.down_proj", layer.ffn)):
            x = inputs[f"model.layers.{index}.{name}"]
            gram = x.T @ x / len(x)
            scale = gram.diagonal().max()
            torch.testing.assert_close(part.gram.double(), gram, rtol=1e-4, atol=float(1e-5 * scale))
            torch.testing.assert_close(part.mean.double(), x.mean(0), rtol=1e-4, atol=float(1e-5 * scale.sqrt()))
            variance = x.var(0, correction=0)
            torch.testing.assert_close(part.variance.double(), variance, rtol=1e-4, atol=float(1e-5 * scale))
            assert part.gram.dtype == part.mean.dtype == part.variance.dtype == torch.float32
            # Negative control: another layer's statistics do not pass.
            other = inputs[f"model.layers.{(index + 1) % 4}.{name}"]
            assert not torch.allclose(part.gram.double(), other.T @ other / len(x), rtol=1e-2)


@pytest.mark.parametrize("size", [1, 60, 10**6])
def test_batches_make_no_difference(monkeypatch, size):
    _, weights = dense_weights()
    sequences = tokens(5, 30)
    expected = list(calibrate(weights, sequences))
    monkeypatch.setitem(BATCH_TOKENS, "cpu", size)
    for ours, theirs in zip(calibrate(weights, sequences), expected, strict=True):
        for part in ("attention", "ffn"):
            for name in ("gram", "mean", "variance"):
                a, b = getattr(getattr(ours, part), name), getattr(getattr(theirs, part), name)
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_only_one_layers_grams_are_alive(monkeypatch):
    living = track_grams(monkeypatch)
    _, weights = dense_weights()
    stream = calibrate(weights, tokens())
    for _ in range(4):
        layer = next(stream)
        assert living() == living.peak == 2
        del layer
    # A caller that holds on to one layer has two, so the count can tell.
    stream = calibrate(weights, tokens())
    kept = next(stream)
    next(stream)
    assert kept is not None and living.peak == 4


def test_permuted_weights_give_permuted_statistics():
    _, weights = dense_weights()
    ranking = random_ranking(weights.structure)
    plain = list(calibrate(weights, tokens()))
    permuted = list(calibrate(weights.permuted(ranking), tokens()))
    for order, a, b in zip(ranking, plain, permuted, strict=True):
        expected = a.ffn.gram[order.ffn][:, order.ffn]
        torch.testing.assert_close(b.ffn.gram, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_half_precision_statistics_are_fp32_and_close():
    model = llama(llama_config(), dtype=torch.bfloat16)
    sequences = tokens(5, 30)
    half = list(calibrate(DecoderWeights.from_model(model), sequences))
    full = list(calibrate(DecoderWeights.from_model(model).to(torch.float32), sequences))
    assert half[0].ffn.gram.dtype == torch.float32
    for a, b in zip(half, full, strict=True):
        assert (a.ffn.gram - b.ffn.gram).norm() < 0.1 * b.ffn.gram.norm()
