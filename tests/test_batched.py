"""The batched evaluator against transformers' own layers, for all models that it claims; and what it refuses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from factories import llama, model_of, tokens
from torch import Tensor

from ppf.families import KINDS
from ppf.fast import batched
from ppf.fast.batched import Batched
from ppf.fast.plan import executed
from ppf.model.build import build, expected_tensors, pruned_config
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy

# Sizes that the kernels take, too; windows are shorter than the text.
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
IDS = tokens(3, 40)
UNCAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
MODELS = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, dynamic rope": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "mistral": ("mistral", {}),
    "mistral, eager": ("mistral", {"attn_implementation": "eager"}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "gemma2": ("gemma2", UNCAPPED),
    "gemma3": ("gemma3_text", {}),
    "smollm3": ("smollm3", {}),
}


def model(name: str, **changes):
    family, own = MODELS[name]
    return model_of(family, **SIZES | own | changes)


@dataclass
class Refitted:
    """Output projections of their own at every level."""

    tables: list[Tensor]

    def levels(self, sublayer: int) -> Tensor:
        return self.tables[sublayer]


def refitted(decoder: Decoder, grid: Grid) -> Refitted:
    s = grid.structure
    shapes = [(grid.maximum[at] + 1, s.hidden, sub.width) for at, sub in enumerate(s.sublayers)]
    tables = [0.2 * torch.randn(shape, device="cpu") for shape in shapes]
    return Refitted([table.to(decoder.device, decoder.dtype) for table in tables])


def policies(grid: Grid) -> list[list[int]]:
    """Levels in the grid's order: the dense policy, one that is bare, and random ones, some of which begin alike."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.tensor(grid.minimum), torch.tensor(grid.maximum)
    drawn = low + (torch.rand(10, grid.sublayers, generator=generator) * (high - low + 1)).long()
    layers = grid.structure.layers
    drawn[3:5, [0, 1, layers, layers + 1]] = drawn[2, [0, 1, layers, layers + 1]]
    drawn[5, [0, layers]] = high[[0, layers]]
    return [list(grid.maximum), list(grid.minimum), *drawn.tolist()]


def reference_losses(
    decoder: Decoder, grid: Grid, library: Refitted | None, levels: Sequence[int], ids: Tensor
) -> float:
    """Summed losses of one policy by transformers' own layers on prefixes, one sub-layer after the other."""
    x, told = decoder.frame.begin(ids), decoder.frame.context(*ids.shape)
    for depth, level in enumerate(executed(levels)):
        index, kind = depth // 2, KINDS[depth % 2]
        at = index + (depth % 2) * grid.structure.layers
        width, output = level * grid.steps[at], None
        if width and library is not None:
            output = library.levels(at)[level, :, : width * grid.structure.sublayers[at].columns]
        tensors = decoder.names(index).prefix(decoder.layers[index], kind, width, output)
        x = decoder.reference(index, dict.fromkeys(KINDS, 0) | {kind: width}, tensors, x, told[index])
    logits = F.linear(decoder.frame.norm(x), decoder.frame.head)[:, :-1].transpose(1, 2).float()
    return float(F.cross_entropy(logits, ids[:, 1:], reduction="none").double().sum())


def engine_of(decoder: Decoder, grid: Grid, library: Refitted | None = None, ids: Tensor = IDS) -> Batched:
    return Batched(decoder, grid, batched.prepare(decoder, grid, library), ids.to(decoder.device))


def in_order(levels: list[list[int]]) -> list[list[int]]:
    return [executed(row) for row in levels]


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_batched_is_the_reference(name, refit):
    """On the ops' references, exact up to rounding; in one chunk or many."""
    decoder = Decoder.of_model(model(name))
    grid = Grid(decoder.structure, 16)
    library, levels = refitted(decoder, grid) if refit else None, policies(grid)
    expected = torch.tensor([reference_losses(decoder, grid, library, row, IDS) for row in levels], dtype=torch.float64)
    engine = engine_of(decoder, grid, library)
    torch.testing.assert_close(engine.losses(in_order(levels)), expected, rtol=1e-5, atol=0)
    assert expected.unique().numel() == len(levels)
    engine.members = 3
    torch.testing.assert_close(engine.losses(in_order(levels)), expected, rtol=1e-5, atol=0)


# What is left out of which sub-layer, or told wrongly, of a model that has it.
FORGOTTEN = [
    ("llama, biases", "attention", {"bias": None}),
    ("llama, biases", "attention", {"o_bias": None}),
    ("llama, biases", "ffn", {"bias": None}),
    ("llama, biases", "ffn", {"down_bias": None}),
    ("qwen2", "attention", {"bias": None}),
    ("qwen3", "attention", {"head_norm": None}),
    ("gemma3", "attention", {"head_norm": None}),
    ("gemma3", "attention", {"after": None}),
    ("gemma3", "ffn", {"after": None}),
    ("gemma2", "told", {"scale": 16**-0.5}),
    ("mistral", "told", {"window": 0}),
    ("gemma3", "told", {"window": 0}),
    ("qwen2, window", "told", {"window": 0}),
]


@pytest.mark.parametrize("name, where, change", FORGOTTEN)
def test_what_is_forgotten_shows(name, where, change):
    """Negative control of the comparison above: whatever a family has beyond Llama changes what comes out."""
    decoder = Decoder.of_model(model(name))
    grid = Grid(decoder.structure, 16)
    engine, dense = engine_of(decoder, grid), in_order([list(grid.maximum)])
    layers = engine.layers
    if where == "told":
        wrong = engine_of(decoder, grid)
        wrong.told = [replace(told, **change) for told in engine.told]
    else:
        changed = [replace(layer, **{where: replace(getattr(layer, where), **change)}) for layer in layers]
        wrong = Batched(decoder, grid, changed, IDS)
    assert abs(wrong.losses(dense) / engine.losses(dense) - 1) > 1e-3


@pytest.mark.parametrize("name", ["gemma3", "smollm3", "llama, dynamic rope"])
def test_layers_rotate_as_transformers_says(name):
    """Layers' rotations differ, and another one gives another result."""
    decoder = Decoder.of_model(model(name))
    grid = Grid(decoder.structure, 16)
    engine, plain = engine_of(decoder, grid), engine_of(decoder, grid)
    angle = torch.arange(40)[:, None] / 1e4 ** (torch.arange(8) / 8)
    plain.told = [replace(told, cos=angle.cos(), sin=angle.sin()) for told in engine.told]
    dense = in_order([list(grid.maximum)])
    assert abs(plain.losses(dense) / engine.losses(dense) - 1) > 1e-4  # ten times what rounding may do
    kinds = {id(told.cos) for told in engine.told}
    assert len(kinds) == (1 if name.startswith("llama") else 2)


@pytest.mark.parametrize("name", ["llama, biases", "qwen3", "gemma3"])
def test_layers_may_differ_and_lack_sublayers(name):
    """A source that is a result of pruning: layer 1 has no attention, layer 2 no FFN, layer 3 neither."""
    dense = model(name)
    config = pruned_config(dense.config, Policy([2, 0, 1, 0], [48, 64, 0, 0]))
    decoder = Decoder.of_model(llama(config))
    grid = Grid(decoder.structure, 16)
    library, levels = refitted(decoder, grid), policies(grid)
    for outputs in (None, library):
        expected = [reference_losses(decoder, grid, outputs, row, IDS) for row in levels]
        assert engine_of(decoder, grid, outputs).losses(in_order(levels)).tolist() == pytest.approx(expected, rel=1e-5)


def test_layers_may_differ_in_query_heads_a_group():
    config = pruned_config(model("llama").config, Policy([2, 1, 2, 1], [64] * 4))
    heads = (4, 2), (4, 1), (4, 2), (4, 1)
    widths = [{"num_attention_heads": query, "num_key_value_heads": key} for query, key in heads]
    config = type(config)(**config.to_dict() | {"per_layer_config": dict(enumerate(widths))})
    state = {name: torch.randn(shape) * 0.2 for name, shape in expected_tensors(config).items()}
    decoder = Decoder.of_model(build(config, state, torch.float32))
    assert [a.columns for a in decoder.structure.attention] == [32, 64, 32, 64]
    grid = Grid(decoder.structure, 16)
    levels = policies(grid)
    expected = [reference_losses(decoder, grid, None, row, IDS) for row in levels]
    assert engine_of(decoder, grid).losses(in_order(levels)).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "family, changes, reason",
    [
        ("gemma2", {}, "logit transform, score cap"),
        ("granite", {}, "residual scale"),
        ("phi3", {}, "partial rotation"),
        ("olmo2", {}, "joint head norm, post-norms"),
        ("ministral3", {}, "position scale"),
        ("llama", {"hidden_act": "relu"}, "activation is relu"),
        ("llama", {"hidden_size": 96}, "hidden size is 96"),
        ("llama", {"head_dim": 8}, "head size 8"),
        ("llama", {}, "not on a GPU"),
        ("llama", {"attn_implementation": "flex_attention"}, "flex_attention"),
    ],
)
def test_what_it_does_not_serve_it_says(family, changes, reason):
    decoder = Decoder.of_model(model_of(family, **SIZES | changes))
    assert reason in batched.unserved_by(decoder) and not batched.applies(decoder)


@pytest.mark.gpu
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_kernels_are_as_exact_as_transformers(name, refit):
    """In bf16, over a dozen policies: at most twice as wrong as transformers' layers on the same weights are."""
    decoder = Decoder.of_model(model(name, dtype=torch.bfloat16).cuda())
    exact = Decoder.of_model(model(name, dtype=torch.bfloat16).float())
    assert batched.unserved_by(decoder) is None and batched.applies(decoder)
    grid = Grid(decoder.structure, 16)
    levels = policies(grid)
    torch.manual_seed(1)
    library = refitted(decoder, grid) if refit else None
    exact_library = Refitted([t.float().cpu() for t in library.tables]) if refit else None
    ids, engine = IDS.cuda(), engine_of(decoder, grid, library)
    expected = torch.tensor([reference_losses(exact, grid, exact_library, row, IDS) for row in levels])
    torchs = torch.tensor([reference_losses(decoder, grid, library, row, ids) for row in levels])
    found = engine.losses(in_order(levels))
    error, allowed = ((losses.cpu() / expected - 1).norm() for losses in (found, torchs))
    assert error <= 2 * allowed and allowed < 0.05
    alone = torch.cat([engine.losses(in_order([row])) for row in levels])
    assert torch.equal(alone, found)  # bit for bit, alone or in company
