"""All states of a wave at once, against transformers' own layers and beside the other paths, for all that it claims."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from factories import llama, model_of, tokens
from kernel_cases import INTERPRETED, interpreted, on_kernels
from torch import Tensor

from ppf.errors import InputError
from ppf.families import KINDS
from ppf.fast import together
from ppf.fast.losses import token_losses
from ppf.fast.sublayers import sublayers_of
from ppf.fast.together import Together
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy

# Sizes that the kernels take, none of them a whole number of tiles; windows are shorter than the text.
SIZES = {"hidden_size": 72, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
IDS = tokens(3, 40)
UNCAPPED = {"attn_logit_softcapping": None}
MODELS = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, gelu": ("llama", {"hidden_act": "gelu"}),
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
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {}),
}
LAYERS = 4


def decoder_of(name: str, dtype=torch.float32) -> Decoder:
    family, own = MODELS[name]
    return Decoder.of_model(model_of(family, dtype=dtype, **SIZES | own))


@dataclass
class Refitted:
    """Output projections of their own at every level: [hidden, width] each."""

    tables: list[list[Tensor]]

    def weight(self, sublayer: int, level: int) -> Tensor:
        return self.tables[sublayer][level]

    def descending(self, sublayer: int, levels: Collection[int]) -> Iterator[tuple[int, Tensor]]:
        for level in sorted(levels, reverse=True):
            yield level, self.weight(sublayer, level)


def refitted(grid: Grid) -> Refitted:
    """In fp32 on the CPU."""
    s = grid.structure

    def drawn(at: int, level: int) -> Tensor:
        return 0.2 * torch.randn(s.hidden, level * grid.steps[at] * s.sublayers[at].columns)

    return Refitted([[drawn(at, level) for level in range(high + 1)] for at, high in enumerate(grid.maximum)])


def cast(library: Refitted | None, device, dtype) -> Refitted | None:
    return library and Refitted([[w.to(device, dtype) for w in levels] for levels in library.tables])


def waves(grid: Grid) -> list[list[tuple[int, int]]]:
    """Moves of every sub-layer in execution order: a state branches, passes, is dropped, changes place, all go on."""

    def level(at: int, share: float) -> int:
        return round(share * grid.maximum[at])

    shapes = [
        [(0, 1.0), (0, 0.5), (0, 0.0)],
        [(0, 1.0), (1, 0.25), (1, 0.75), (2, 0.5), (0, 0.0)],
        [(3, 1.0), (0, 0.5), (1, 1.0), (4, 0.0)],
        [(0, 0.5), (1, 1.0), (2, 0.0), (3, 0.25)],
        [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0)],
        [(0, 0.0), (2, 0.0), (3, 0.0)],
        [(0, 1.0), (1, 0.5), (2, 1.0)],
        [(0, 0.75), (1, 0.75), (2, 0.0)],
    ]
    layers = grid.structure.layers
    places = [depth // 2 + layers * (depth % 2) for depth in range(2 * layers)]
    return [[(source, level(at, share)) for source, share in moves] for at, moves in zip(places, shapes, strict=True)]


def paths(grid: Grid) -> list[list[int]]:
    """The levels, in execution order, that lead to every last state."""
    found: list[list[int]] = [[]]
    for moves in waves(grid):
        found = [[*found[source], level] for source, level in moves]
    return found


def run(stepper: Together, ids: Tensor = IDS) -> tuple[Tensor, Tensor]:
    """The last states and their losses."""
    ids = ids.to(stepper.decoder.device)
    states = stepper.begin(stepper.decoder.frame.begin(ids))
    for depth, moves in enumerate(waves(stepper.grid)):
        states = stepper.advance(depth // 2, KINDS[depth % 2], states, moves)
    return states, stepper.losses(states, ids)


def alone(stepper: Together, path: list[int], ids: Tensor = IDS) -> tuple[Tensor, Tensor]:
    """One state and its loss without any company."""
    ids = ids.to(stepper.decoder.device)
    states = stepper.begin(stepper.decoder.frame.begin(ids))
    for depth, level in enumerate(path):
        states = stepper.advance(depth // 2, KINDS[depth % 2], states, [(0, level)])
    return states[0], stepper.losses(states, ids)[0]


def by_reference(decoder: Decoder, grid: Grid, library: Refitted | None, path: list[int]) -> tuple[Tensor, float]:
    """The same by transformers' own layers on prefixes."""
    ids = IDS.to(decoder.device)
    x, told = decoder.frame.begin(ids), decoder.frame.context(*ids.shape)
    for depth, level in enumerate(path):
        index, kind = depth // 2, KINDS[depth % 2]
        at = index + (depth % 2) * grid.structure.layers
        output = None if library is None else library.weight(at, level)
        tensors = decoder.names(index).prefix(decoder.layers[index], kind, level * grid.steps[at], output)
        widths = dict.fromkeys(KINDS, 0) | {kind: level * grid.steps[at]}
        x = decoder.reference(index, widths, tensors, x, told[index]) if level else x
    return x, float(token_losses(decoder.frame, x, ids).double().sum())


@pytest.mark.parametrize("multiple", [16, 64])
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_together_is_the_reference(name, refit, multiple):
    """On the ops' references, exact up to rounding."""
    decoder = decoder_of(name)
    grid = Grid(decoder.structure, multiple)
    library = refitted(grid) if refit else None
    states, losses = run(Together(decoder, grid, library))
    assert losses.dtype is torch.float64 and losses.unique().numel() == len(losses)
    for path, state, loss in zip(paths(grid), states, losses.tolist(), strict=True):
        expected, expected_loss = by_reference(decoder, grid, library, path)
        torch.testing.assert_close(state, expected, rtol=2e-4, atol=2e-4)
        assert loss == pytest.approx(expected_loss, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "granite"])
def test_together_is_as_one_by_one(name):
    """Against the path that takes one state after the other."""
    decoder = decoder_of(name)
    grid, one = Grid(decoder.structure, 16), sublayers_of(decoder)
    states, _ = run(Together(decoder, grid, None))
    for path, state in zip(paths(grid), states, strict=True):
        x = decoder.frame.begin(IDS)
        for depth, level in enumerate(path):
            index, kind = depth // 2, KINDS[depth % 2]
            width = level * grid.steps[index + (depth % 2) * LAYERS]
            told = decoder.frame.context(*IDS.shape)[index]
            x = one(index, kind, width, None, x, told) if level else x
        torch.testing.assert_close(state, x, rtol=2e-4, atol=2e-4)


# What is left out of which sub-layer, or told wrongly, of a model that has it.
FORGOTTEN = [
    ("llama, biases", "attention", {"bias": None}),
    ("llama, biases", "attention", {"o_bias": None}),
    ("llama, biases", "ffn", {"bias": None}),
    ("llama, biases", "ffn", {"down_bias": None}),
    ("qwen3", "attention", {"head_norm": None}),
    ("gemma3", "attention", {"after": None}),
    ("gemma3", "ffn", {"after": None}),
    ("gemma2", "told", {"scale": 16**-0.5}),
    ("mistral", "told", {"window": 0}),
    ("gemma3", "told", {"window": 0}),
    ("smollm3", "told", {"cos": torch.ones(40, 8), "sin": torch.zeros(40, 8)}),
    ("granite", "_scale", 1.0),
]


@pytest.mark.parametrize("name, where, change", FORGOTTEN)
def test_what_is_forgotten_shows(name, where, change):
    """Negative control of the comparisons above: whatever a family has beyond Llama changes what comes out."""
    decoder = decoder_of(name)
    grid = Grid(decoder.structure, 16)
    stepper, wrong = Together(decoder, grid, None), Together(decoder, grid, None)
    if where == "told":
        wrong._told = {40: [replace(told, **change) for told in stepper._tell(40)]}
    elif where == "_scale":
        wrong._scale = change
    else:
        wrong.layers = [replace(la, **{where: replace(getattr(la, where), **change)}) for la in stepper.layers]
    dense = [grid.maximum[depth // 2 + LAYERS * (depth % 2)] for depth in range(2 * LAYERS)]
    assert abs(alone(wrong, dense)[1] / alone(stepper, dense)[1] - 1) > 1e-4  # ten times what rounding may do


@pytest.mark.parametrize("name", ["llama, biases", "gemma3"])
def test_layers_may_differ_and_lack_sublayers(name):
    """A source that is a result of pruning: layer 1 has no attention, layer 2 no FFN, layer 3 neither."""
    family, own = MODELS[name]
    config = pruned_config(model_of(family, **SIZES | own).config, Policy([2, 0, 1, 0], [48, 64, 0, 0]))
    decoder = Decoder.of_model(llama(config))
    grid = Grid(decoder.structure, 16)
    library = refitted(grid)
    for outputs in (None, library):
        states, _ = run(Together(decoder, grid, outputs))
        for path, state in zip(paths(grid), states, strict=True):
            expected = by_reference(decoder, grid, outputs, path)[0]
            torch.testing.assert_close(state, expected, rtol=2e-4, atol=2e-4)


def test_bad_moves_are_named():
    decoder = decoder_of("llama")
    stepper = Together(decoder, Grid(decoder.structure, 16), None)
    states = stepper.begin(decoder.frame.begin(IDS))
    for move in ((1, 1), (-1, 1), (0, 3), (0, -1)):
        with pytest.raises(InputError, match="a level that there is not"):
            stepper.advance(0, "attention", states, [(0, 1), move])


def test_few_at_a_time_change_no_bits(monkeypatch):
    """More states than go through a sub-layer together; what passes, branches and is dropped goes with some of them."""
    for name in ("llama", "gemma3"):
        decoder = decoder_of(name)
        stepper = Together(decoder, Grid(decoder.structure, 16), None)
        expected, _ = run(stepper)
        monkeypatch.setattr(together, "_TOKENS", 2 * IDS.numel())
        found, _ = run(stepper)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        monkeypatch.undo()


@pytest.mark.parametrize(
    "family, changes, reason",
    [
        ("gemma2", {}, "score cap"),
        ("phi3", {}, "partial rotation"),
        ("olmo2", {}, "joint head norm, post-norms"),
        ("ministral3", {}, "position scale"),
        ("llama", {"hidden_act": "relu"}, "activation is relu"),
        ("llama", {"hidden_size": 68}, "multiple of 8"),
        ("llama", {"head_dim": 8}, "head size is 8"),
        ("llama", {"intermediate_size": 60}, "multiple of 8"),
        ("llama", {}, "not on a GPU"),
        ("llama", {"attn_implementation": "flex_attention"}, "flex_attention"),
    ],
)
def test_what_it_does_not_serve_it_says(family, changes, reason):
    decoder = Decoder.of_model(model_of(family, **SIZES | changes))
    assert reason in together.unserved_by(decoder)


def on_the_kernels(monkeypatch) -> None:
    """Steppers call the kernels themselves, whatever the device; more rows at once, for the interpreter's sake."""
    from ppf.kernels import grouped, grouped_attention, grouped_rows

    monkeypatch.setitem(grouped_rows.ROWS, "ROWS", 8)

    def outputs(y, x, inner, weights, bias, *tables_and_scale):
        *tables, scale = tables_and_scale
        grouped.outputs(y, x, inner, weights, bias, tables, scale)

    kernels = {
        "norm": grouped_rows.norm, "residual": grouped_rows.residual, "stack": grouped_rows.stack, "outputs": outputs,
        "heads": grouped.heads, "hidden": grouped.hidden, "attention": grouped_attention.attention,
    }  # fmt: skip
    for name, kernel in kernels.items():
        monkeypatch.setattr(torch.ops.ppf, f"grouped_{name}", kernel)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the ops are the kernels")
@pytest.mark.parametrize("name", ["llama, biases", "gemma3"])
def test_kernels_step_as_the_references(name, monkeypatch):
    """Under the interpreter: the kernels as the stepper launches them, in company and alone. Longer than the window."""
    decoder, ids = decoder_of(name), tokens(2, 19)
    grid = Grid(decoder.structure, 16)
    stepper = Together(decoder, grid, refitted(grid))
    expected, _ = run(stepper, ids)
    on_the_kernels(monkeypatch)
    found, _ = run(stepper, ids)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    assert not torch.equal(found, expected)  # they are other sums than torch's
    assert torch.equal(alone(stepper, paths(grid)[1], ids)[0], found[1])


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels run directly here")
def test_kernels_under_the_interpreter():
    interpreted(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_on_a_gpu_as_exact_as_transformers(name, refit):
    """In bf16: at most twice as wrong as transformers' layers on the same weights; the same bits in any company."""
    family, own = MODELS[name]
    made = (model_of(family, dtype=torch.bfloat16, **SIZES | own) for _ in range(2))
    exact, decoder = Decoder.of_model(next(made).double()), Decoder.of_model(next(made).cuda())
    assert together.unserved_by(decoder) is None
    grid = Grid(decoder.structure, 16)
    library = cast(refitted(grid), "cpu", torch.bfloat16) if refit else None
    stepper = Together(decoder, grid, cast(library, "cuda", torch.bfloat16))
    states, losses = run(stepper)
    found, torchs, wanted = [], [], []
    for at, path in enumerate(paths(grid)):
        lone, loss = alone(stepper, path)
        assert torch.equal(lone, states[at]) and torch.equal(loss, losses[at])
        x, expected = by_reference(exact, grid, cast(library, "cpu", torch.float64), path)
        by_torch, torchs_loss = by_reference(decoder, grid, cast(library, "cuda", torch.bfloat16), path)
        errors = [float((state.cpu().double() - x).norm() / x.norm()) for state in (states[at], by_torch)]
        assert errors[0] <= 2 * max(errors[1], 2**-9)
        found, torchs, wanted = [*found, float(loss)], [*torchs, torchs_loss], [*wanted, expected]
    wrong = [F.mse_loss(torch.tensor(v).double(), torch.tensor(wanted).double()) ** 0.5 for v in (found, torchs)]
    assert wrong[0] <= 2 * max(wrong[1], 1e-3 * wanted[0])


@on_kernels
@pytest.mark.gpu
def test_order_and_company_change_no_bits():
    """Many states of a few tiles each, in another order, and one by one."""
    decoder = Decoder.of_model(model_of("llama", dtype=torch.bfloat16, **SIZES | {"intermediate_size": 512}).cuda())
    grid, ids = Grid(decoder.structure, 64), tokens(3, 300).cuda()
    stepper = Together(decoder, grid, None)
    generator = torch.Generator().manual_seed(0)
    high = torch.tensor([grid.maximum[depth // 2 + LAYERS * (depth % 2)] for depth in range(2 * LAYERS)])
    levels = (torch.rand(20, 2 * LAYERS, generator=generator) * (high + 1)).long()

    def losses(rows: Tensor) -> Tensor:
        states = stepper.begin(decoder.frame.begin(ids))
        for depth in range(2 * LAYERS):
            moves = [(0 if depth == 0 else at, level) for at, level in enumerate(rows[:, depth].tolist())]
            states = stepper.advance(depth // 2, KINDS[depth % 2], states, moves)
        return stepper.losses(states, ids)

    found = losses(levels)
    assert torch.equal(losses(levels.flip(0)).flip(0), found)
    assert torch.equal(torch.cat([losses(row[None]) for row in levels]), found)
