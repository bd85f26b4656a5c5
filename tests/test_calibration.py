"""Calibration statistics against hooks on the Hugging Face model."""

import pytest
import torch
from factories import config_of, dense_weights, llama, llama_config, random_ranking, tokens, track_grams

from ppf import ranks
from ppf.families import KINDS, families
from ppf.fast.permute import permuted
from ppf.fitting.calibration import LayerStatistics, Moments, Statistics, calibrate
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.layer import expand_units
from ppf.model.policy import Policy
from ppf.text import BATCH_TOKENS

pytestmark = pytest.mark.usefixtures("one_thread")
IRREGULAR = Policy([3, 0, 2, 0], [64, 16, 0, 0])
MODELS = {
    "mha": lambda: llama(llama_config("mha")),
    "tied": lambda: llama(llama_config(tie_word_embeddings=True)),
    "half of a Llama": lambda: llama(pruned_config(llama_config(), IRREGULAR)),
    "half of a Gemma": lambda: llama(pruned_config(config_of("gemma3_text"), IRREGULAR)),
} | {f.model_type: lambda f=f: llama(config_of(f.model_type)) for f in families()}


def hooked_inputs(model, sequences) -> dict[str, torch.Tensor]:
    """Inputs fp64 [tokens, n] of every output projection, by module name."""
    seen, ends = {}, tuple(part.output_name for part in Decoder.of_model(model).family.parts.values())
    for name, module in model.named_modules():
        if name.endswith(ends):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].flatten(0, -2).double()}))
    with torch.no_grad():
        model(sequences)
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_the_model(name):
    """For every family, and for a source whose layers differ: what is absent has none."""
    model, sequences = MODELS[name](), tokens(5, 30)
    decoder, inputs = Decoder.of_model(model), hooked_inputs(model, sequences)
    found = list(calibrate(decoder, sequences))
    assert len(found) == 4
    tried = 0
    for index, layer in enumerate(found):
        for kind in KINDS:
            part, module = layer.of(kind), f"model.layers.{index}.{decoder.family.parts[kind].output_name}"
            assert (part is None) == (module not in inputs)
            if part is None:
                continue
            x = inputs.pop(module)
            gram = x.T @ x / len(x)
            scale = gram.diagonal().max()
            torch.testing.assert_close(part.gram.double(), gram, rtol=1e-4, atol=float(1e-5 * scale))
            torch.testing.assert_close(part.mean.double(), x.mean(0), rtol=1e-4, atol=float(1e-5 * scale.sqrt()))
            variance = x.var(0, correction=0)
            torch.testing.assert_close(part.variance.double(), variance, rtol=1e-4, atol=float(1e-5 * scale))
            assert torch.equal(part.second_moment, part.gram.diagonal())
            assert part.gram.dtype == part.mean.dtype == part.variance.dtype == torch.float32
            tried += 1
    assert tried == (4 if "half" in name else 8) and not inputs


def test_another_layers_statistics_do_not_pass():
    """Negative control of the test above."""
    model, sequences = MODELS["mha"](), tokens(5, 30)
    inputs = hooked_inputs(model, sequences)
    for index, layer in enumerate(calibrate(Decoder.of_model(model), sequences)):
        for kind, module in (("attention", "self_attn.o_proj"), ("ffn", "mlp.down_proj")):
            other = inputs[f"model.layers.{(index + 1) % 4}.{module}"]
            assert not torch.allclose(layer.of(kind).gram.double(), other.T @ other / len(other), rtol=1e-2)


@pytest.mark.parametrize("size", [1, 60, 10**6])
def test_batches_make_no_difference(monkeypatch, size):
    _, decoder = dense_weights()
    sequences = tokens(5, 30)
    expected = list(calibrate(decoder, sequences))
    monkeypatch.setitem(BATCH_TOKENS, "cpu", size)
    for ours, theirs in zip(calibrate(decoder, sequences), expected, strict=True):
        for kind in KINDS:
            for name in ("gram", "mean", "variance"):
                a, b = getattr(ours.of(kind), name), getattr(theirs.of(kind), name)
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_only_one_layers_grams_are_alive(monkeypatch):
    """Two, and three times as many while four shards are added as a tree."""
    living = track_grams(monkeypatch)
    _, decoder = dense_weights()
    stream = calibrate(decoder, tokens(6, 10))
    for _ in range(4):
        layer = next(stream)
        assert living() == 2 and living.peak == 6
        del layer
    # A caller that holds on to one layer has two more, so the count can tell.
    stream = calibrate(decoder, tokens(6, 10))
    kept = next(stream)
    next(stream)
    assert kept is not None and living.peak == 8


def test_sums_do_not_depend_on_how_many_processes_the_shards_are_on():
    """Each process's branch summed on its own, then the branches: the same bits on one to four. Added one after the
    other they are not, so that equal bits say something."""
    leaves = [torch.randn(50, 50) for _ in range(4)]

    def tree(span: range, parts: dict[range, torch.Tensor]) -> torch.Tensor:
        if span in parts:
            return parts[span]
        left, right = ranks.halves(span)
        return tree(left, parts) + tree(right, parts)

    alone = tree(range(4), {range(at, at + 1): leaf for at, leaf in enumerate(leaves)})
    for processes in range(1, 5):
        spans = ranks.subtrees(4, processes)
        branches = {span: tree(span, {range(at, at + 1): leaves[at] for at in span}) for span in spans}
        assert len(spans) == processes and [at for span in spans for at in span] == [0, 1, 2, 3]
        assert torch.equal(ranks.folded(range(4), branches), alone)
    assert not torch.equal(((leaves[0] + leaves[1]) + leaves[2]) + leaves[3], alone)


def test_more_processes_than_shards_have_none():
    assert ranks.subtrees(3, 5) == [range(1), range(1, 2), range(2, 3), range(3, 3), range(3, 3)]
    assert ranks.subtrees(8, 5) == [range(1), range(1, 2), range(2, 4), range(4, 6), range(6, 8)]


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_permuted_weights_give_permuted_statistics(family):
    _, decoder = dense_weights(family=family)
    ranking = random_ranking(decoder.structure)
    plain = list(calibrate(decoder, tokens()))
    ranked = list(calibrate(permuted(decoder, ranking), tokens()))
    for index, (order, a, b) in enumerate(zip(ranking, plain, ranked, strict=True)):
        for kind in KINDS:
            channels = expand_units(order.of(kind), decoder.structure.of(kind)[index].columns)
            expected = a.of(kind).gram[channels][:, channels]
            torch.testing.assert_close(b.of(kind).gram, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_half_precision_statistics_are_fp32_and_close():
    decoder = Decoder.of_model(llama(llama_config(), dtype=torch.bfloat16))
    sequences = tokens(5, 30)
    half = list(calibrate(decoder, sequences))
    full = list(calibrate(decoder.to(torch.float32), sequences))
    assert half[0].ffn.gram.dtype == torch.float32
    for a, b in zip(half, full, strict=True):
        assert (a.ffn.gram - b.ffn.gram).norm() < 0.1 * b.ffn.gram.norm()


def test_moments_are_what_is_left_of_statistics():
    x = torch.randn(50, 7) + 0.5
    statistics = Statistics(x.T @ x / 50, x.mean(0), x.var(0, correction=0))
    moments = Moments(statistics.mean, statistics.variance)
    torch.testing.assert_close(moments.second_moment, statistics.second_moment)
    order = torch.randperm(7)
    torch.testing.assert_close(moments.ordered(order).second_moment, statistics.second_moment[order])
    layer = LayerStatistics(None, moments)
    assert layer.of("attention") is None and layer.of("ffn") is moments
