"""masked_linear and the kernels below it: kept outputs, kept inputs, transposed weights, groups of policies."""

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
from ppf.fast.ops.grouped import grouped_masked_linear
from ppf.fast.ops.masked_linear import call, masked_linear
from ppf.fast.ops.selection import Selection

KINDS = ["prefix", "empty", "full", "sorted", "shuffled", "repeated", "blocks"]


def operands(tokens, inputs, outputs, dtype, device=DEVICE):
    torch.manual_seed(tokens + inputs)
    x = torch.randn(tokens, inputs, dtype=dtype, device=device)
    return x, torch.randn(outputs, inputs, dtype=dtype, device=device) / inputs**0.5


def shrunk_products(x, weight, out, into):
    """torch on physically shrunk weights, in the dtype and in fp64."""
    kept = into.take(out.take(weight, 0), 1).contiguous()
    return F.linear(x, kept), F.linear(x.double(), kept.double())


def agrees(got, x, weight, out, into):
    return within_twice(got, *shrunk_products(x, weight, out, into))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("side", ["out", "in", "both"])
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 16, 129])
def test_every_selection_and_side(tokens, kind, side, transposed):
    """The public op where this machine runs it: every branch of the dispatch on a GPU, the reference on a CPU."""
    dtype = torch.bfloat16
    x, weight = operands(tokens, 192, 256, dtype)
    out = selections(256)[kind] if side != "in" else Selection.full(256)
    into = selections(192)[kind] if side != "out" else Selection.full(192)
    x = into.take(x, 1)
    stored = weight.t().contiguous() if transposed else weight
    y = masked_linear(x, stored, out, into, transposed=transposed)
    assert agrees(y, x, weight, out, into)


@pytest.mark.parametrize("tokens", [1, 16, 129])
def test_one_wrong_index_is_noticed(tokens):
    """Negative control: the check above fails as soon as a single kept unit is another one."""
    x, weight = operands(tokens, 192, 256, torch.bfloat16)
    rows = torch.randperm(256)[:99]
    wrong = rows.clone()
    wrong[50] = (wrong[50] + 1) % 256
    y = masked_linear(x, weight, Selection.indices(wrong, 256))
    full = Selection.full(192)
    assert not agrees(y, x, weight, Selection.indices(rows, 256), full)
    assert agrees(y, x, weight, Selection.indices(wrong, 256), full)


@pytest.mark.parametrize("tokens", [1, 5, 129])
def test_strided_and_misaligned_operands(tokens):
    """Views: every other row of x, a weight that starts at an odd element, a weight with a long row pitch."""
    x = torch.randn(2 * tokens, 192, device=DEVICE).bfloat16()[::2]
    wide = torch.randn(256, 201, device=DEVICE).bfloat16()
    for weight in (wide[:, 3:195], wide[:, :192], torch.randn(192, 256, device=DEVICE).bfloat16().t()):
        for selection in selections(256):
            y = masked_linear(x, weight, selection)
            assert agrees(y, x, weight, selection, Selection.full(192))


def test_leading_dimensions_are_kept():
    x, weight = operands(12, 64, 128, torch.float32)
    y = masked_linear(x.view(3, 4, 64), weight, Selection.prefix(50, 128))
    torch.testing.assert_close(y.view(12, 50), F.linear(x, weight[:50]))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_x_and_weight(transposed):
    """Against finite differences, repeated units included; pruned entries get exactly zero."""
    torch.manual_seed(0)
    out, into = Selection.indices([5, 1, 1, 7], 9), Selection.indices([0, 3, 2, 3], 6)
    weight = torch.randn((6, 9) if transposed else (9, 6), dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, w: masked_linear(a, w, out, into, transposed=transposed), (x, weight))
    masked_linear(x, weight, out, into, transposed=transposed).sum().backward()
    pruned = torch.ones(9, 6)
    pruned[torch.tensor([5, 1, 7])[:, None], torch.tensor([0, 3, 2])] = 0
    assert not (weight.grad.T if transposed else weight.grad)[pruned.bool()].any()


def test_opcheck():
    x, weight = operands(3, 192, 256, torch.bfloat16)
    for out in selections(256):
        for into in selections(192)[:4]:
            arguments = (
                out.kind,
                out.width,
                out.rows(x.device),
                None,
                into.kind,
                into.width,
                into.rows(x.device),
                None,
                False,
            )
            torch.library.opcheck(torch.ops.ppf.masked_linear, (into.take(x, 1), weight, *arguments))


def test_compiles_as_one_graph():
    x, weight = operands(4, 192, 256, torch.float32)
    selection = Selection.indices(torch.randperm(256)[:100], 256)
    compiled = torch.compile(lambda a, w: masked_linear(a, w, selection).relu(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), masked_linear(x, weight, selection).relu())


@pytest.mark.gpu
def test_compiles_with_inductor():
    """One graph, no breaks, and the same bits as eager: the kernels see the arguments that eager gives them."""
    x, weight = operands(3, 192, 256, torch.bfloat16, "cuda")
    many, stored = torch.randn(300, 192, dtype=torch.bfloat16, device="cuda"), weight.t().contiguous()
    out = Selection.indices(torch.randperm(256)[:96], 256)
    into = Selection.indices(torch.randperm(192)[:80], 192)
    for selection in (out, into):
        selection.rows(x.device)

    def products(few, many):
        few_in, many_in = few[:, :80], many[:, :80]
        return (
            masked_linear(few, weight, out) * 2,
            masked_linear(few_in, weight, None, into) * 2,
            masked_linear(few_in, stored, None, into, transposed=True) * 2,
            masked_linear(many, weight, out) * 2,
            masked_linear(many_in, stored, None, into, transposed=True) * 2,
        )

    for got, wanted in zip(torch.compile(products, fullgraph=True)(x, many), products(x, many), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Selection.prefix(9, 8), "width"),
        (lambda: Selection.prefix(-1, 8), "width"),
        (lambda: Selection.indices([0, 8], 8), "indices"),
        (lambda: Selection.indices([-1], 8), "indices"),
        (lambda: Selection.indices(torch.tensor([0.5]), 8), "indices"),
        (lambda: Selection.blocks([2], 128), "blocks"),
        (lambda: Selection.blocks([0], 100), "total"),
        (lambda: masked_linear(torch.ones(2, 8), torch.ones(4, 8), Selection.full(5)), "out_selection"),
        (lambda: masked_linear(torch.ones(2, 8), torch.ones(4, 8), None, Selection.prefix(3, 8)), "x"),
        (lambda: masked_linear(torch.ones(2, 8), torch.ones(4, 8).half()), "weight"),
        (lambda: masked_linear(torch.ones(2, 8), torch.ones(4, 8, device="meta")), "weight"),
        (lambda: masked_linear(torch.ones(2, 8), torch.ones(8)), "weight"),
        (lambda: masked_linear(torch.ones(2, 8, dtype=torch.int32), torch.ones(4, 8)), "x"),
        (lambda: grouped_masked_linear(torch.ones(2, 3, 8), torch.ones(4, 8), [1]), "x"),
        (lambda: grouped_masked_linear(torch.ones(2, 3, 8), torch.ones(4, 8), [1, 5]), "weight"),
        (lambda: grouped_masked_linear(torch.ones(2, 3, 8), torch.ones(4, 8), [1, -1]), "widths"),
        (lambda: grouped_masked_linear(torch.ones(1, 3, 8), torch.ones(4, 8), [1], side="left"), "side"),
        (lambda: grouped_masked_linear(torch.ones(1, 3, 8), torch.ones(4, 9), [9], side="input"), "x"),
    ],
)
def test_bad_input_is_named(make, field):
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.field == field


def test_selection_finds_the_cheaper_kind():
    assert repr(Selection.indices(range(70), 128)) == "Selection(prefix, 70 of 128)"
    assert repr(Selection.indices([*range(64, 128), *range(64)], 128)) == "Selection(blocks, 128 of 128)"
    assert repr(Selection.indices([1, 0], 128)) == "Selection(indices, 2 of 128)"
    groups = Selection.indices([2, 0], 4).groups(3)
    assert groups.rows(torch.device("cpu")).tolist() == [6, 7, 8, 0, 1, 2] and groups.total == 12


def grouped_case(side, widths, form, dtype=torch.bfloat16, tokens=70):
    """x, weight(s) in ``form`` (shared, stacked, list) and, per group, the shrunk and the fp64 product."""
    torch.manual_seed(1)
    groups, inputs, outputs = len(widths), 192, 320
    x = torch.randn(groups, tokens, inputs, dtype=dtype, device=DEVICE)
    weights = torch.randn(groups, outputs, inputs, dtype=dtype, device=DEVICE) / inputs**0.5
    if form == "shared":
        weights = weights[:1].expand(groups, -1, -1)
    products = []
    for p, w in enumerate(widths):
        kept = weights[p, :w] if side == "output" else weights[p, :, :w]
        part = x[p] if side == "output" else x[p, :, :w]
        products.append((F.linear(part, kept), F.linear(part.double(), kept.double())))
    given = {"shared": weights[0], "stacked": weights, "list": [w.clone() for w in weights]}[form]
    return x, given, products


@pytest.mark.parametrize("form", ["shared", "stacked", "list"])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("widths", [[64, 192, 0], [1, 100, 192, 65, 128], [192]])
def test_groups_stop_at_their_own_width(widths, side, form):
    if side == "output" and form == "list" and len(widths) > 1:
        pytest.skip("outputs take stacked weights")
    x, weight, products = grouped_case(side, widths, form)
    if side == "input":
        for p, width in enumerate(widths):
            x[p, :, width:] = float("nan")  # what is pruned is not used
    y = grouped_masked_linear(x, weight, widths, side=side)
    for p, width in enumerate(widths):
        if side == "output":
            assert not y[p, :, width:].any()
        assert within_twice(y[p, :, :width] if side == "output" else y[p], *products[p])


def test_grouped_opcheck():
    x, weight, _ = grouped_case("input", [64, 100], "list")
    torch.library.opcheck(torch.ops.ppf.grouped_inputs, (x, weight, [64, 100]))
    torch.library.opcheck(torch.ops.ppf.grouped_outputs, (x, weight[0], [64, 100]))


# Kernels, launched directly: on a GPU, or under the interpreter in a process of its own.


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_small_kernels(tokens, dtype):
    from ppf.kernels import gemv

    small = {"BN": 16, "BK": 64, "STAGES": 2, "num_warps": 4} if INTERPRETED else {}
    config = {"T": 1 if tokens == 1 else 16, **small} if small else None
    columns = {"T": 16, "BC": 32, "BH": 64, "STAGES": 2, "num_warps": 4, "WAVES": 3} if small else None
    x, weight = operands(tokens, 200 if tokens == 5 else 192, 256, dtype)
    full = Selection.full(x.shape[1])
    for out in kernel_selections(256):
        y = gemv.rows(x, (weight,), out.rows(x.device), out.width, config=config)
        assert agrees(y, x, weight, out, full)
    for into in kernel_selections(x.shape[1]):
        kept = into.take(x, 1)
        stored = weight.t().contiguous()
        y = gemv.columns(kept, stored, into.rows(x.device), config=columns)
        assert agrees(y, kept, weight, Selection.full(256), into)
        entries = into.entries(x.device)
        y = gemv.rows(kept, (weight,), None, 256, into.kind, entries, config=config)
        assert agrees(y, kept, weight, Selection.full(256), into)


@on_kernels
@pytest.mark.parametrize("tokens", [1, 5])
def test_masked_kernel_never_touches_a_pruned_column(tokens):
    from ppf.kernels import gemv

    config = {"T": 1 if tokens == 1 else 16, "BN": 16, "BK": 64, "STAGES": 2, "num_warps": 4}
    x, weight = operands(tokens, 192, 256, DTYPES[0])
    into = Selection.indices(torch.randperm(192)[:99], 192)
    pruned = torch.ones(192, dtype=torch.bool).index_fill_(0, into.rows(torch.device("cpu")).long(), False)
    weight[:, pruned.to(DEVICE)] = float("nan")
    kept = into.take(x, 1)
    put, counts = gemv.expand(kept, into.rows(x.device), 192)
    y = gemv.rows(put, (weight,), None, 256, gemv.MASKED, counts, config)
    assert agrees(y, kept, weight, Selection.full(256), into)


@on_kernels
def test_expand_kernel():
    from ppf.kernels import gemv

    x = torch.randn(3, 2500, device=DEVICE).to(DTYPES[0])
    rows = torch.randperm(5001)[:2500].int().to(DEVICE)
    wanted = x.new_zeros(3, 5001).index_copy_(1, rows.long(), x)
    put, counts = gemv.expand(x, rows, 5001)
    assert torch.equal(put, wanted)
    assert torch.equal(counts.bool(), torch.zeros(5001, dtype=bool, device=DEVICE).index_fill_(0, rows.long(), True))


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [33, 130])
def test_tile_kernels(tokens, dtype):
    from ppf.kernels import masked_linear as tiles

    tile = {"BM": 64, "BN": 64, "BK": 64, "GROUP": 2, "num_warps": 4, "num_stages": 3} if INTERPRETED else None
    x, weight = operands(tokens, 192, 256, dtype)
    blocks = Selection.blocks([2, 0], 192)
    part = blocks.take(x, 1).contiguous()
    for out in kernel_selections(256):
        y = tiles.linear(x, weight, out.rows(x.device), out.width, config=tile)
        assert agrees(y, x, weight, out, Selection.full(192))
        y = tiles.linear(part, weight, out.rows(x.device), out.width, blocks.entries(x.device), config=tile)
        assert agrees(y, part, weight, out, blocks)
    for into in kernel_selections(192):
        kept = into.take(x, 1)
        y = tiles.linear(kept, weight.t().contiguous(), into.rows(x.device), 256, transposed=True, config=tile)
        assert agrees(y, kept, weight, Selection.full(256), into)


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_kernels(dtype):
    from ppf.kernels import blocks as kernels

    x, weight = operands(130, 192, 256, dtype)
    into = Selection.blocks([2, 0], 192)
    part = into.take(x, 1).contiguous()
    tile = {"BM": 128, "BN": 64, "GROUP": 2, "num_warps": 4, "num_stages": 3}
    for transposed, stored in ((False, weight), (True, weight.t().contiguous())):
        y = kernels.input_blocks(part, stored, into.entries(x.device), transposed, tile)
        assert agrees(y, part, weight, Selection.full(256), into)
    tile = {"BM": 64, "BK": 64, "GROUP": 2, "num_warps": 4, "num_stages": 2}
    for list_ in ([3, 1], [2, 0, 3], [1]):
        out = Selection.blocks(list_, 256)
        y = kernels.linear_blocks(x, weight, out.entries(x.device), tile)
        assert agrees(y, x, weight, out, Selection.full(192))


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["shared", "stacked", "list"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_grouped_kernels(side, form, dtype):
    from ppf.kernels import grouped

    widths = (64, 0, 100, 192)
    x, weight, products = grouped_case(side, widths, form, dtype)
    if side == "output" and form == "list":
        return
    config = {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}
    if side == "output":
        y = grouped.outputs(x, weight, widths, config)
    else:
        y = grouped.inputs(x, weight if isinstance(weight, list) else [weight], widths, config)
    for p, width in enumerate(widths):
        assert within_twice(y[p, :, :width] if side == "output" else y[p], *products[p])


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly here")
def test_kernels_under_the_interpreter():
    interpreted(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_graph_replay_is_the_same_bits(tokens):
    """Captured in a CUDA graph, replayed on new input: bit-identical to the eager call, run to run."""
    x, weight = operands(tokens, 1024, 2048, torch.bfloat16)
    into = Selection.indices(torch.randperm(1024)[:500], 1024)
    held, stored = into.take(x, 1), weight.t().contiguous()
    masked_linear(held, stored, in_selection=into, transposed=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = masked_linear(held, stored, in_selection=into, transposed=True)
    for _ in range(3):
        held.copy_(torch.randn_like(held))
        graph.replay()
        assert torch.equal(y, masked_linear(held, stored, in_selection=into, transposed=True))


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements():
    weight = torch.zeros(2**31 // 4096 + 64, 4096, dtype=torch.bfloat16, device="cuda")
    last = Selection.indices([weight.shape[0] - 1, weight.shape[0] - 2, 5], weight.shape[0])
    kept = torch.randn(3, 4096, dtype=torch.bfloat16, device="cuda")
    weight[last.rows(weight.device).long()] = kept
    for tokens in (1, 16, 300):
        x = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda")
        assert within_twice(masked_linear(x, weight, last), F.linear(x, kept), F.linear(x.double(), kept.double()))


@pytest.mark.gpu
def test_caller_stream_is_used():
    """Work is ordered by the caller's stream alone: a side stream sees its own writes, with no wait in between."""
    x, weight = operands(16, 1024, 1024, torch.bfloat16)
    rows = Selection.indices(torch.randperm(1024)[:333], 1024)
    rows.rows(x.device)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late = x * 2
        y = call(late, weight, rows, Selection.full(1024), False)
    side.synchronize()
    assert agrees(y, x * 2, weight, rows, Selection.full(1024))
