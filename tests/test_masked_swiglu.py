"""masked_swiglu, its grouped form, and the gate-and-up kernels below them."""

import pytest
import torch
import torch.nn.functional as F
from masked_cases import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    interpreted,
    kernel_selections,
    on_kernels,
    selections,
    within_twice,
)

from ppf.errors import InputError
from ppf.fast.ops.grouped import grouped_masked_swiglu
from ppf.fast.ops.masked_swiglu import masked_swiglu
from ppf.fast.ops.selection import BLOCKS, Selection

HIDDEN, CHANNELS = 192, 320
KINDS = ["prefix", "empty", "full", "sorted", "shuffled", "repeated", "blocks"]


def operands(tokens, dtype, device=DEVICE):
    torch.manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, dtype=dtype, device=device)
    gate, up = (torch.randn(CHANNELS, HIDDEN, dtype=dtype, device=device) / HIDDEN**0.5 for _ in range(2))
    return x, gate, up, torch.randn(HIDDEN, CHANNELS, dtype=dtype, device=device) / CHANNELS**0.5


def hidden(x, gate, up):
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def shrunk(x, gate, up, down, selection):
    """torch on physically shrunk weights, in the dtype and in fp64."""
    kept = [selection.take(gate, 0), selection.take(up, 0), selection.take(down, 1)]
    return tuple(F.linear(hidden(a, g, u), d) for a, g, u, d in ((x, *kept), (x.double(), *(w.double() for w in kept))))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
@pytest.mark.parametrize("tokens", [1, 7, 16, 130])
def test_every_selection(tokens, kind, transposed):
    x, gate, up, down = operands(tokens, torch.bfloat16)
    selection = selections(CHANNELS)[kind]
    stored = down.t().contiguous() if transposed else down
    y = masked_swiglu(x, gate, up, stored, selection, down_transposed=transposed)
    assert within_twice(y, *shrunk(x, gate, up, down, selection))


@pytest.mark.parametrize("tokens", [1, 16, 130])
def test_one_wrong_channel_is_noticed(tokens):
    """Negative control: one kept channel exchanged for another fails the check above."""
    x, gate, up, down = operands(tokens, torch.bfloat16)
    rows = torch.randperm(CHANNELS)[:101]
    wrong = rows.clone()
    wrong[7] = next(c for c in range(CHANNELS) if c not in rows)
    y = masked_swiglu(x, gate, up, down, Selection.indices(wrong, CHANNELS))
    assert not within_twice(y, *shrunk(x, gate, up, down, Selection.indices(rows, CHANNELS)))
    assert within_twice(y, *shrunk(x, gate, up, down, Selection.indices(wrong, CHANNELS)))


def test_gradients():
    torch.manual_seed(0)
    x, gate, up, down = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 4), (6, 4), (6, 4), (4, 6))
    )
    selection = Selection.indices([5, 0, 0, 2], 6)
    assert torch.autograd.gradcheck(lambda *a: masked_swiglu(*a, selection), (x, gate, up, down))


def test_gradients_agree_with_the_inference_path():
    """Training composes the MLP from masked_linear; inference fuses it. Both are the same function."""
    x, gate, up, down = operands(33, torch.float32)
    selection = selections(CHANNELS)[4]
    inference = masked_swiglu(x, gate, up, down, selection)
    torch.testing.assert_close(masked_swiglu(x.requires_grad_(), gate, up, down, selection).detach(), inference)


def test_opcheck():
    x, gate, up, down = operands(3, torch.bfloat16)
    for s in selections(CHANNELS):
        blocks = s.entries(x.device) if s.kind == BLOCKS else None
        arguments = (x, gate, up, down, s.kind, s.width, s.rows(x.device), blocks, False)
        torch.library.opcheck(torch.ops.ppf.masked_swiglu, arguments)


def test_compiles_as_one_graph():
    x, gate, up, down = operands(4, torch.float32)
    selection = selections(CHANNELS)[3]
    compiled = torch.compile(
        lambda a: masked_swiglu(a, gate, up, down, selection) + a, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), masked_swiglu(x, gate, up, down, selection) + x)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"up": torch.ones(5, 8)}, "up"),
        ({"down": torch.ones(6, 8)}, "down"),
        ({"x": torch.ones(2, 7)}, "x"),
        ({"gate": torch.ones(6)}, "gate"),
        ({"gate": torch.ones(6, 8).half()}, "gate"),
        ({"selection": Selection.full(7)}, "selection"),
    ],
)
def test_bad_input_is_named(change, field):
    good = {"x": torch.ones(2, 8), "gate": torch.ones(6, 8), "up": torch.ones(6, 8), "down": torch.ones(8, 6)}
    masked_swiglu(**good)
    with pytest.raises(InputError) as caught:
        masked_swiglu(**{**good, **change})
    assert caught.value.field == field


@pytest.mark.parametrize("form", ["shared", "stacked", "list"])
@pytest.mark.parametrize("widths", [[320, 64, 0], [100, 1, 256, 129]])
def test_groups(widths, form):
    torch.manual_seed(2)
    x, gate, up, down = operands(len(widths) * 70, torch.bfloat16)
    x = x.view(len(widths), 70, HIDDEN)
    downs = torch.stack([down * (p + 1) if form != "shared" else down for p in range(len(widths))])
    given = {"shared": down, "stacked": downs, "list": list(downs.unbind())}[form]
    y = grouped_masked_swiglu(x, gate, up, given, widths)
    for p, width in enumerate(widths):
        assert within_twice(y[p], *shrunk(x[p], gate, up, downs[p], Selection.prefix(width, CHANNELS)))


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 16, 130])
def test_gate_up_kernels(tokens, dtype):
    from ppf.kernels import gemv
    from ppf.kernels import masked_swiglu as tiles

    x, gate, up, _ = operands(tokens, dtype)
    small = {"T": 1 if tokens == 1 else 16, "BN": 32, "BK": 64, "STAGES": 2, "num_warps": 4} if INTERPRETED else None
    tile = {"BM": 64, "BN": 64, "BK": 64, "GROUP": 2, "num_warps": 4, "num_stages": 3} if INTERPRETED else None
    for s in kernel_selections(CHANNELS):
        kept = s.take(gate, 0), s.take(up, 0)
        wanted = hidden(x, *kept), hidden(x.double(), *(w.double() for w in kept))
        if tokens <= gemv.MAX_TOKENS:
            y = gemv.rows(x, (gate, up), s.rows(x.device), s.width, config=small)
        else:
            y = tiles.gate_up(x, gate, up, s.rows(x.device), s.width, config=tile)
        assert within_twice(y, *wanted)


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_engine_kernel(dtype):
    from ppf.kernels.blocks import gate_up_blocks

    x, gate, up, _ = operands(130, dtype)
    blocks = Selection.blocks([4, 0, 2], CHANNELS)
    kept = blocks.take(gate, 0), blocks.take(up, 0)
    config = {"BM": 64, "BK": 64, "GROUP": 2, "num_warps": 4, "num_stages": 3}
    y = gate_up_blocks(x, gate, up, blocks.entries(x.device), config)
    assert within_twice(y, hidden(x, *kept), hidden(x.double(), *(w.double() for w in kept)))


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_kernel_zeroes_the_down_step(dtype):
    """Past a group's width the hidden activations are zero up to the next multiple of 64."""
    from ppf.kernels import grouped

    widths = (64, 0, 100)
    x, gate, up, _ = operands(3 * 70, dtype)
    config = {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}
    h = grouped.gate_up(x.view(3, 70, HIDDEN), gate, up, widths, config)
    for p, width in enumerate(widths):
        part = x.view(3, 70, HIDDEN)[p]
        wanted = hidden(part, gate[:width], up[:width])
        exact = hidden(part.double(), gate[:width].double(), up[:width].double())
        assert within_twice(h[p, :, :width], wanted, exact)
    assert not h[2, :, 100:128].any()


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_kernel(dtype):
    from ppf.kernels import masked_swiglu as tiles

    gate, up = torch.randn(2, 5, 1500, dtype=dtype, device=DEVICE)
    gate, up = gate[:, :1303], up[:, 7:1310]
    assert within_twice(tiles.multiply_silu(gate, up), F.silu(gate) * up, F.silu(gate.double()) * up.double())


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly here")
def test_kernels_under_the_interpreter():
    interpreted(__file__)


@pytest.mark.gpu
def test_compiles_with_inductor():
    x, gate, up, down = operands(3, torch.bfloat16, "cuda")
    kept = [selections(CHANNELS)[kind] for kind in (0, 4, 6)]
    for selection in kept:
        selection.rows(x.device)

    def every(*a):
        return [masked_swiglu(*a, selection) + 1 for selection in kept]

    for got, wanted in zip(
        torch.compile(every, fullgraph=True)(x, gate, up, down), every(x, gate, up, down), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [0.5, 0.75])
@pytest.mark.parametrize("tokens", [1, 16, 512, 4096])
def test_llama_shapes_in_a_graph(tokens, keep):
    """Llama-2-7B's MLP, every kind of selection, captured and replayed: the eager bits, within the error rule."""
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda")
    gate, up = (torch.randn(11008, 4096, dtype=torch.bfloat16, device="cuda") / 64 for _ in range(2))
    down = torch.randn(4096, 11008, dtype=torch.bfloat16, device="cuda") / 105
    width = int(11008 * keep) // 64 * 64
    order = torch.randperm(11008)
    blocks = torch.randperm(172)[: width // 64]
    for s in (Selection.prefix(width, 11008), Selection.blocks(blocks, 11008), Selection.indices(order[:width], 11008)):
        wanted = shrunk(x, gate, up, down, s)
        for stored, transposed in ((down, False), (down.t().contiguous(), True)):
            eager = masked_swiglu(x, gate, up, stored, s, down_transposed=transposed)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = masked_swiglu(x, gate, up, stored, s, down_transposed=transposed)
            graph.replay()
            assert torch.equal(y, eager) and within_twice(y, *wanted)
