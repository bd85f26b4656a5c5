"""The differentiable masked model: the same losses as evaluation, gradients, and biases for what is gone."""

import pytest
import torch
from factories import config_of, dense_weights, llama, model_of, random_ranking, tokens

from ppf.errors import InputError
from ppf.families import families
from ppf.fast.permute import permuted
from ppf.fitting.evaluation import Evaluator
from ppf.fitting.masked import masked_losses
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:ppf. evaluation runs transformers' own layers"),
]
IDS = tokens(3, 24)
POLICY = Policy([3, 0, 2, 0], [64, 16, 0, 0])
MODELS = {f.model_type: lambda f=f: model_of(f.model_type) for f in families()} | {
    "half of a Qwen2": lambda: llama(pruned_config(config_of("qwen2"), POLICY)),
}


def levels_for(grid: Grid) -> list[int]:
    """A little less everywhere; nothing of some."""
    return [max(low, top - 1 - (i % 3)) for i, (low, top) in enumerate(zip(grid.minimum, grid.maximum, strict=True))]


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_evaluation(name):
    decoder = Decoder.of_model(MODELS[name]())
    grid = Grid(decoder.structure, 16)
    decoder = permuted(decoder, random_ranking(decoder.structure))
    evaluator = Evaluator(decoder, grid, IDS)
    for levels in (list(grid.maximum), levels_for(grid), list(grid.minimum)):
        losses = masked_losses(decoder, grid, levels, IDS)
        policy = grid.decode(torch.tensor([levels]))[0]
        assert losses.shape == (3, 23) and losses.dtype == torch.float32
        assert float(losses.double().mean()) == pytest.approx(evaluator.log_perplexity(policy), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_gradients_reach_what_is_kept_and_nothing_else(family):
    """The first units have a gradient, the others an exact zero; fused matrices have their parts' own borders."""
    _, decoder = dense_weights(family=family)
    grid = Grid(decoder.structure, 16)
    levels = grid.encode([Policy([2, 0, 3, 1], [32, 64, 0, 16])])[0].tolist()
    leaves = [{name: tensor.clone().requires_grad_() for name, tensor in layer.items()} for layer in decoder.layers]
    masked_losses(decoder, grid, levels, IDS, leaves).mean().backward()
    for index, layer in enumerate(leaves):
        names = decoder.names(index)
        for kind, width in (("attention", levels[index]), ("ffn", 16 * levels[index + 4])):
            for unit in names.unit_tensors(layer, kind):
                gradient = layer[unit.name].grad
                if not width:
                    assert gradient is None
                    continue
                units = torch.arange(names.units(kind))
                kept, gone = (unit.index(part, names.units(kind)) for part in (units[:width], units[width:]))
                norms = gradient if gradient.dim() == 1 else gradient.norm(dim=1 - unit.dim)
                assert (norms[kept] != 0).all() and not norms[gone].any(), unit.name


def test_biases_stand_in_for_what_is_gone():
    """Added to what an output projection gives, be it cut or gone; against a model that has such biases itself."""
    model = model_of("llama", attention_bias=True, mlp_bias=True)
    decoder, ids = Decoder.of_model(model), IDS
    grid = Grid(decoder.structure, 16)
    levels = grid.encode([Policy([2, 3, 3, 1], [32, 64, 16, 16])])[0].tolist()
    biases = {s: 0.3 * torch.randn(48, generator=torch.Generator().manual_seed(s)) for s in (0, 2, 5, 7)}
    found = masked_losses(decoder, grid, levels, ids, biases=biases)
    assert not torch.allclose(found, masked_losses(decoder, grid, levels, ids), rtol=1e-3)
    for sublayer, bias in biases.items():
        part = ("self_attn.o_proj", "mlp.down_proj")[sublayer // 4]
        model.model.layers[sublayer % 4].get_submodule(part).bias.data += bias
    expected = masked_losses(Decoder.of_model(model), grid, levels, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_bias_in_the_place_of_an_absent_sublayer(family):
    """The same as a sub-layer whose units are all zero and that has the bias alone; Granite scales either."""
    model, decoder = dense_weights(family=family, attention_bias=True, mlp_bias=True)
    grid = Grid(decoder.structure, 16)
    levels = grid.encode([Policy([3, 0, 3, 3], [64, 64, 0, 64])])[0].tolist()
    biases = {1: torch.linspace(-1, 1, 48), 6: torch.linspace(2, -1, 48)}
    found = masked_losses(decoder, grid, levels, IDS, biases=biases)
    for index, name, sublayer in ((1, "self_attn.o_proj", 1), (2, "mlp.down_proj", 6)):
        projection = model.model.layers[index].get_submodule(name)
        projection.weight.data.zero_()
        projection.bias.data.copy_(biases[sublayer])
    expected = masked_losses(Decoder.of_model(model), grid, list(grid.maximum), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_biases_before_a_norm_are_refused(family):
    _, decoder = dense_weights(family=family)
    grid = Grid(decoder.structure, 16)
    with pytest.raises(InputError, match="norm behind it"):
        masked_losses(decoder, grid, list(grid.maximum), IDS, biases={0: torch.ones(48)})
