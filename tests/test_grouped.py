"""The grouped ops: every group of tokens meets its own prefix of the weights. All against fp64, beside torch."""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, DTYPES, INTERPRETED, interpreted, on_kernels, within_twice

from ppf.errors import InputError
from ppf.fast.ops.grouped import grouped_masked_linear, grouped_masked_swiglu

HIDDEN, CHANNELS, TOKENS = 192, 320, 70
TILE = {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}


def draw(*shape, dtype, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype).to(DEVICE)


def linear_case(side, widths, form, dtype=torch.bfloat16, inputs=HIDDEN, outputs=CHANNELS):
    """x, weight(s) in ``form`` (shared, stacked, list) and, per group, the product and the fp64 product."""
    x = draw(len(widths), TOKENS, inputs, dtype=dtype)
    weights = draw(1 if form == "shared" else len(widths), outputs, inputs, dtype=dtype, scale=inputs**-0.5)
    products = []
    for p, width in enumerate(widths):
        weight = weights[p % len(weights)]
        kept = weight[:width] if side == "output" else weight[:, :width]
        part = x[p] if side == "output" else x[p, :, :width]
        products.append((F.linear(part, kept), F.linear(part.double(), kept.double())))
    return x, {"shared": weights[0], "stacked": weights, "list": [w.clone() for w in weights]}[form], products


def hidden(x, gate, up):
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def mlp_case(widths, dtype=torch.bfloat16):
    """x, gate, up and a down for each group, each another multiple of the first."""
    x, gate, up = draw(len(widths), TOKENS, HIDDEN, dtype=dtype), *draw(2, CHANNELS, HIDDEN, dtype=dtype, scale=0.07)
    down = draw(HIDDEN, CHANNELS, dtype=dtype, scale=CHANNELS**-0.5)
    return x, gate, up, torch.stack([down * (p + 1) for p in range(len(widths))])


def mlp_products(x, gate, up, down, width):
    """One group's MLP of its prefix in the dtype and in fp64."""
    kept = gate[:width], up[:width], down[:, :width]
    wide = [w.double() for w in kept]
    return F.linear(hidden(x, *kept[:2]), kept[2]), F.linear(hidden(x.double(), *wide[:2]), wide[2])


def kept_part(y, side, p, width):
    return y[p, :, :width] if side == "output" else y[p]


@pytest.mark.parametrize("form", ["shared", "stacked", "list"])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("widths", [[64, 192, 0], [1, 100, 192, 65, 128], [192]])
def test_groups_stop_at_their_own_width(widths, side, form):
    if side == "output" and form == "list" and len(widths) > 1:
        pytest.skip("outputs take stacked weights")
    x, weight, products = linear_case(side, widths, form)
    if side == "input":
        for p, width in enumerate(widths):
            x[p, :, width:] = float("nan")  # what is pruned is not used
    y = grouped_masked_linear(x, weight, widths, side=side)
    for p, width in enumerate(widths):
        assert side == "input" or not y[p, :, width:].any()
        assert within_twice(kept_part(y, side, p, width), *products[p])


@pytest.mark.parametrize("side", ["output", "input"])
def test_any_layout(side):
    """Odd sizes, rows that start anywhere, tokens with gaps between: kernels or not, the same product."""
    widths = [33, 101, 0]
    x, weight, products = linear_case(side, widths, "shared", inputs=101, outputs=117)
    gaps = torch.stack((x, x), 2).flatten(1, 2)[:, ::2]
    shifted = F.pad(weight, (3, 0))[:, 3:]
    for given, matrix in ((gaps, weight), (x, shifted), (gaps, shifted)):
        y = grouped_masked_linear(given, matrix, widths, side=side)
        for p, width in enumerate(widths):
            assert within_twice(kept_part(y, side, p, width), *products[p])


@pytest.mark.parametrize("side", ["output", "input"])
def test_one_unit_more_is_noticed(side):
    """Negative control: the products of one group, one unit wider, fail the checks above, and only that group's."""
    widths, wrong = [64, 100], [64, 101]
    x, weight, products = linear_case(side, widths, "shared")
    y = grouped_masked_linear(x, weight, wrong, side=side)
    assert within_twice(kept_part(y, side, 0, 64), *products[0])
    if side == "output":
        assert y[1, :, 100:].any()
    else:
        assert not within_twice(y[1], *products[1])


@pytest.mark.parametrize("form", ["shared", "stacked", "list"])
@pytest.mark.parametrize("widths", [[320, 64, 0], [100, 1, 256, 129]])
def test_mlps(widths, form):
    x, gate, up, downs = mlp_case(widths)
    if form == "shared":
        downs = downs[:1].expand_as(downs)
    given = {"shared": downs[0], "stacked": downs, "list": list(downs.unbind())}[form]
    y = grouped_masked_swiglu(x, gate, up, given, widths)
    for p, width in enumerate(widths):
        assert within_twice(y[p], *mlp_products(x[p], gate, up, downs[p], width))


def test_one_channel_more_is_noticed():
    x, gate, up, downs = mlp_case([64, 100])
    y = grouped_masked_swiglu(x, gate, up, downs, [64, 101])
    assert within_twice(y[0], *mlp_products(x[0], gate, up, downs[0], 64))
    assert not within_twice(y[1], *mlp_products(x[1], gate, up, downs[1], 100))
    assert within_twice(y[1], *mlp_products(x[1], gate, up, downs[1], 101))


def test_ops_are_well_formed():
    x, weight, _ = linear_case("input", [64, 100], "list")
    torch.library.opcheck(torch.ops.ppf.grouped_inputs, (x, weight, [64, 100]))
    torch.library.opcheck(torch.ops.ppf.grouped_outputs, (x, weight[0], [64, 100]))
    # Both widths end in the same step of 64: past a group's own step the kernel leaves anything.
    torch.library.opcheck(torch.ops.ppf.grouped_gate_up, (x, weight[0], weight[1], [128, 100]))


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: grouped_masked_linear(torch.ones(2, 3, 8), torch.ones(4, 8), [1]), "x"),
        (lambda: grouped_masked_linear(torch.ones(2, 3, 8), torch.ones(4, 8), [1, 5]), "weight"),
        (lambda: grouped_masked_linear(torch.ones(2, 3, 8), torch.ones(4, 8).half(), [1, 2]), "weight"),
        (lambda: grouped_masked_linear(torch.ones(2, 3, 8), torch.ones(4, 8), [1, -1]), "widths"),
        (lambda: grouped_masked_linear(torch.ones(1, 3, 8), torch.ones(4, 8), [1], side="left"), "side"),
        (lambda: grouped_masked_linear(torch.ones(1, 3, 8), torch.ones(4, 9), [9], side="input"), "x"),
        (lambda: grouped_masked_swiglu(torch.ones(1, 3, 8), *torch.ones(2, 6, 8), torch.ones(8, 5), [6]), "down"),
        (lambda: grouped_masked_swiglu(torch.ones(1, 3, 8), *map(torch.ones, ((6, 8), (5, 8), (8, 6))), [5]), "up"),
    ],
)
def test_bad_input_is_named(make, field):
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.field == field


# Kernels, launched directly: on a GPU, or under the interpreter in a process of its own.


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["shared", "stacked", "list"])
@pytest.mark.parametrize("side", ["output", "input"])
def test_linear_kernels(side, form, dtype):
    from ppf.kernels import grouped

    if side == "output" and form == "list":
        pytest.skip("outputs take stacked weights")
    widths = (64, 0, 100, 192)
    x, weight, products = linear_case(side, widths, form, dtype)
    if side == "output":
        y = grouped.outputs(x, weight, widths, TILE)
    else:
        y = grouped.inputs(x, weight if isinstance(weight, list) else [weight], widths, TILE)
    for p, width in enumerate(widths):
        assert within_twice(kept_part(y, side, p, width), *products[p])


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_up_kernel_zeroes_the_down_step(dtype):
    """Past a group's width the hidden activations are zero up to the next multiple of 64."""
    from ppf.kernels import grouped

    widths = (64, 0, 100)
    x, gate, up, _ = mlp_case(widths, dtype)
    h = grouped.gate_up(x, gate, up, widths, TILE)
    for p, width in enumerate(widths):
        kept = gate[:width], up[:width]
        exact = hidden(x[p].double(), *(w.double() for w in kept))
        assert within_twice(h[p, :, :width], hidden(x[p], *kept), exact)
    assert not h[2, :, 100:128].any()


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly here")
def test_kernels_under_the_interpreter():
    interpreted(__file__)
