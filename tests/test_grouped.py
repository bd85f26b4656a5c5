"""The grouped ops: every state of a wave at its own width. Kernels against the references in fp64, beside torch."""

from functools import partial

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, INTERPRETED, error, interpreted, on_kernels

from ppf.errors import InputError
from ppf.fast.ops import grouped as ops

# The interpreter takes a twentieth of a second for a tile: there are fewer there, and ragged ones all the same.
LENGTH, SEQUENCES, HIDDEN, CHANNELS, GROUPS = 19 if INTERPRETED else 35, 2, 72, 104, 3
TOKENS = LENGTH * SEQUENCES
STATES, FEW = ((3, 1), (2, 1)) if INTERPRETED else ((3, 1, 2), (3, 1, 2))  # kv-groups of the states
# Both ways to launch: programs that walk over several tiles, and one a tile.
WALK = {"BM": 32, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2, "programs": 1}
EACH = WALK | {"BM": 16, "BN": 32, "programs": 0}
STAGES = {"num_warps": 4, "num_stages": 2}
# What the interpreter is spared: what the same kernel does with other tiles, or in a case that asks for more.
SPARED = {
    "walk": {"attention, long window", "heads"},
    "each": {"norm", "norm, fp32 weight", "residual", "residual, fp32 weight, scale", "losses", "losses, whole tiles",
             "losses, transformed", "heads", "attention, whole tiles", "attention, window 3", "hidden, gelu",
             "hidden, gelu tanh", "outputs, bias and scale"},
}  # fmt: skip


def draw(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def norm_of(size, dtype):
    return 1 + draw(size, dtype=dtype, scale=0.2)


def norm_case(dtype, norm_dtype=None):
    return draw(4, TOKENS, HIDDEN, dtype=dtype), norm_of(HIDDEN, norm_dtype or dtype), [2, 0, 3], 1e-5


def heads_case(dtype, full=False, heads=2, d=16, groups=STATES):
    """``full``: with all that a family may have."""
    x, unit = draw(len(groups), TOKENS, HIDDEN, dtype=dtype), (heads + 2) * d
    weight = draw(GROUPS * unit, HIDDEN, dtype=dtype, scale=HIDDEN**-0.5)
    bias, head_norm = None, None
    if full:
        bias, head_norm = draw(len(weight), dtype=dtype), 2 * norm_of(unit, torch.float32)
        head_norm[-d:] = 1
    angle = torch.arange(LENGTH)[:, None] * 0.3 ** torch.arange(d // 2)
    rows = [count * unit for count in groups]
    cos, sin = (values.to(dtype).to(DEVICE) for values in (angle.cos(), angle.sin()))
    return x, weight, bias, head_norm, cos, sin, rows, LENGTH, unit, 1e-5


def attention_case(dtype, window=0, length=35, heads=2, d=16, groups=STATES):
    qkv = draw(len(groups), SEQUENCES * length, GROUPS * (heads + 2) * d, dtype=dtype)
    return qkv, list(groups), length, heads, d, d**-0.5, window


def hidden_case(dtype, activation="silu", biased=False, widths=(104, 1, 40)):
    x = draw(len(widths), TOKENS, HIDDEN, dtype=dtype)
    weight = draw(2 * CHANNELS, HIDDEN, dtype=dtype, scale=HIDDEN**-0.5)
    return x, weight, draw(2 * CHANNELS, dtype=dtype) if biased else None, list(widths), activation


def outputs_case(dtype, biased=False, residual=True, scale=1.0):
    """Jobs of all widths, a source that goes on twice, and one that nothing is added to."""
    widths = [104, 0, 24, 1, 65]
    inner, x = draw(2, TOKENS, CHANNELS, dtype=dtype), draw(4, TOKENS, HIDDEN, dtype=dtype)
    weights = draw(5, HIDDEN, CHANNELS, dtype=dtype, scale=CHANNELS**-0.5)
    tables = [0, 0, 1, 1, 0], widths, [2, 0, 1, 3, 4], [3, 1, 1, 0, 2], [0, 4, 1, 3, 2]
    for width, which in zip(widths, tables[2], strict=True):
        weights[which, :, width:] = 0
    y = torch.zeros(5, TOKENS, HIDDEN, dtype=dtype, device=DEVICE)
    return y, x if residual else None, inner, weights, draw(HIDDEN, dtype=dtype) if biased else None, *tables, scale


def residual_case(dtype, norm_dtype=None, scale=1.0):
    x, given = draw(3, TOKENS, HIDDEN, dtype=dtype), draw(2, TOKENS, HIDDEN, dtype=dtype)
    return x, given, norm_of(HIDDEN, norm_dtype or dtype), [2, 0, 0, 1], [1, -1, 0, 1], 1e-5, scale


def losses_case(dtype, vocabulary=150, scale=1.0, cap=None):
    head = draw(vocabulary, HIDDEN, dtype=dtype, scale=0.3)
    targets = torch.randint(0, vocabulary, (TOKENS,), device=DEVICE)
    return draw(3, TOKENS, HIDDEN, dtype=dtype), head, targets, LENGTH, scale, cap


# Lengths that end within a tile and that do not; windows within a tile, and so long that queries see tiles whole: in
# the interpreter those of 16 queries.
LONG = {"window": 33, "length": 50} if INTERPRETED else {"window": 50, "length": 100}
CASES = {
    "norm": norm_case,
    "norm, fp32 weight": partial(norm_case, norm_dtype=torch.float32),
    "heads": heads_case,
    "heads, all": partial(heads_case, full=True),
    "heads, of 32": partial(heads_case, full=True, heads=1, d=32, groups=(1,)),
    "attention": attention_case,
    "attention, whole tiles": partial(attention_case, length=64, groups=FEW),
    "attention, window 3": partial(attention_case, window=3, groups=FEW),
    "attention, long window": partial(attention_case, **LONG, groups=FEW),
    "attention, one head": partial(attention_case, heads=1, d=32, groups=(2,)),
    "hidden": hidden_case,
    "hidden, biases": partial(hidden_case, biased=True),
    "hidden, gelu": partial(hidden_case, activation="gelu"),
    "hidden, gelu tanh": partial(hidden_case, activation="gelu_pytorch_tanh"),
    "outputs": outputs_case,
    "outputs, bias and scale": partial(outputs_case, biased=True, scale=0.5),
    "outputs, product only": partial(outputs_case, biased=True, residual=False),
    "residual": residual_case,
    "residual, fp32 weight, scale": partial(residual_case, norm_dtype=torch.float32, scale=0.5),
    "losses": losses_case,
    "losses, whole tiles": partial(losses_case, vocabulary=128),
    "losses, transformed": partial(losses_case, scale=2.0, cap=3.0),
}
# Where every op has what may be left out, and what stands there then.
OPTIONAL = {
    "norm": {}, "attention": {6: 0}, "residual": {6: 1.0}, "losses": {4: 1.0, 5: None},
    "heads": {2: None, 3: None}, "hidden": {2: None, 4: "silu"}, "outputs": {4: None, 10: 1.0},
}  # fmt: skip
TABLES = {"norm": [2], "attention": [1], "residual": [3, 4], "losses": [], "heads": [6], "hidden": [3],
          "outputs": [5, 7, 8]}  # fmt: skip


def wide(arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def reference(name, arguments):
    """What the reference gives; of outputs, what it wrote."""
    arguments = [arguments[0].clone(), *arguments[1:]] if name == "outputs" else arguments
    found = getattr(ops, f"{name}_reference")(*arguments)
    return arguments[0] if name == "outputs" else found


def widths_of(name, arguments):
    """The columns of every state that are its own."""
    if name == "heads":
        return arguments[6]
    return [count * arguments[3] * arguments[4] for count in arguments[1]] if name == "attention" else None


def kept(name, arguments, value):
    """What is defined, and zero past it, as the references have it."""
    widths = widths_of(name, arguments)
    if name == "hidden":
        widths = [-(-width // 64) * 64 for width in arguments[3]]  # zeros in a state's last step are checked
    if widths is None:
        return value
    own = torch.arange(value.shape[2], device=DEVICE) < torch.tensor(widths, device=DEVICE)[:, None, None]
    return torch.where(own, value, 0)


def poisoned(name, arguments):
    """With NaN wherever a kernel must not look: past the widths of its inputs."""
    given = list(arguments)
    if name == "attention":
        qkv, groups, _, heads, d, *_ = arguments
        own = torch.arange(qkv.shape[2], device=DEVICE) < (heads + 2) * d * torch.tensor(groups, device=DEVICE)[:, None]
        given[0] = torch.where(own[:, None], qkv, torch.nan).contiguous()
    if name == "outputs":  # of every inner state, zeros from its widest job to the end of the step, then anything
        inner = torch.full((2, TOKENS, 192), torch.nan, dtype=arguments[2].dtype, device=DEVICE)
        for state, (width, step) in enumerate(((104, 128), (24, 64))):
            inner[state, :, :step] = 0
            inner[state, :, :width] = arguments[2][state, :, :width]
        given[2] = inner
    return given


def launch(name, arguments, config):
    """The kernel of an op with these tiles."""
    from ppf.kernels import grouped, grouped_attention, grouped_losses, grouped_rows

    if name == "outputs":
        y, *others, scale = arguments
        y = y.clone()
        grouped.outputs(y, *others[:4], others[4:], scale, config)
        return y
    modules = {"norm": grouped_rows, "residual": grouped_rows, "attention": grouped_attention, "losses": grouped_losses}
    return getattr(modules.get(name, grouped), name)(*arguments, config=config)


def tiles_of(name, which):
    if which == "default":
        return None
    tile = WALK if which == "walk" else EACH
    if name in ("norm", "residual"):
        return {"ROWS": 4 if which == "walk" else 1, "num_warps": 4}
    if name == "attention":
        each = 16 if INTERPRETED else 32
        return {"BM": 32 if which == "walk" else each, "BN": 16 if which == "walk" else each} | STAGES
    return {k: v for k, v in tile.items() if k != "programs"} if name == "losses" else tile


@on_kernels
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", ["walk", "each", "default"])
def test_kernels_are_as_exact_as_torch(case, dtype, tiles):
    name = case.split(",")[0]
    if INTERPRETED and (tiles == "default" or case in SPARED[tiles]):
        pytest.skip("the default tiles are for GPUs, and the interpreter is slow")
    arguments = CASES[case](dtype)
    given = arguments if name == "outputs" and tiles == "each" else poisoned(name, arguments)
    found = kept(name, arguments, launch(name, given, tiles_of(name, tiles)))
    wanted, torchs = reference(name, wide(arguments)), reference(name, arguments)
    floor = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}[dtype]
    assert error(found, wanted) <= 2 * max(error(torchs, wanted), floor / 2)
    # Negative control: what another state has, or another family, gives another result.
    for wrong in wrong_arguments(name, arguments):
        assert error(reference(name, wide(wrong)), wanted) > 0.01


def wrong_arguments(name, arguments):
    """With another state's tables, and with each optional thing left out."""
    for at in TABLES[name]:
        if len(set(arguments[at])) > 1 and not (name == "outputs" and at == 8 and arguments[1] is None):
            yield [*arguments[:at], arguments[at][::-1], *arguments[at + 1 :]]
    for at, missing in OPTIONAL[name].items():
        if arguments[at] is not missing and arguments[at] != missing:
            yield [*arguments[:at], missing, *arguments[at + 1 :]]


def test_matrices_are_stacked():
    weights = [draw(40, width, dtype=torch.float32) for width in (24, 0, 72)]
    weights.append(draw(40, 30, dtype=torch.float32)[:, 5:12])
    found = torch.ops.ppf.grouped_stack(weights, 72)
    for weight, stacked in zip(weights, found, strict=True):
        assert torch.equal(stacked[:, : weight.shape[1]], weight) and not stacked[:, weight.shape[1] :].any()


@on_kernels
@pytest.mark.parametrize("shift", [0, 1])
def test_kernels_stack_matrices(shift):
    """Matrices of other pitches, at any place."""
    from ppf.kernels import grouped_rows

    columns = draw(40, 700, dtype=DTYPES[0])
    weights = [draw(40, 24, dtype=DTYPES[0]), columns[:, shift : shift + 600], columns[:, 64 : 64 + 8]]
    assert torch.equal(grouped_rows.stack(weights, 608), ops.stack_reference(weights, 608))


def test_what_is_overwritten_may_be_its_own_source():
    _, x, *others = outputs_case(torch.float32)
    tables = [0, 1], [104, 24], [2, 1], [3, 1], [3, 1]
    separate, aliased = torch.zeros_like(x), x.clone()
    torch.ops.ppf.grouped_outputs(separate, x, *others[:3], *tables, 1.0)
    torch.ops.ppf.grouped_outputs(aliased, aliased, *others[:3], *tables, 1.0)
    assert torch.equal(aliased[[3, 1]], separate[[3, 1]]) and torch.equal(aliased[[0, 2]], x[[0, 2]])


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith(("heads", "attention", "hidden"))])
def test_ops_are_well_formed(case):
    """Those without columns that a kernel leaves undefined."""
    arguments = CASES[case](torch.float32 if DEVICE == "cpu" else torch.bfloat16)
    torch.library.opcheck(getattr(torch.ops.ppf, f"grouped_{case.split(',')[0]}"), tuple(arguments))


def changed(case, at, value):
    arguments = list(CASES[case](torch.float32))
    arguments[at] = value(arguments[at]) if callable(value) else value
    return f"grouped_{case}", arguments


BAD = [
    ("norm", 2, [4], "states"),
    ("norm", 2, [], "states"),
    ("heads", 6, [192, 64], "rows"),
    ("heads", 6, [192, 64, 65], "rows"),
    ("heads", 6, [256, 64, 64], "rows"),
    ("heads", 7, 36, "length"),
    ("heads", 1, lambda w: w.half(), "weight"),
    ("heads", 0, lambda x: x.mT.contiguous().mT, "x"),
    ("attention", 1, [4, 1, 1], "groups"),
    ("attention", 1, [0, 1, 1], "groups"),
    ("hidden", 3, [105, 1, 1], "widths"),
    ("hidden", 4, "relu", "activation"),
    ("outputs", 0, lambda y: y[:4], "targets"),
    ("outputs", 5, [2, 0, 0, 0, 0], "inners"),
    ("outputs", 6, [105, 0, 0, 0, 0], "widths"),
    ("outputs", 6, [104, 0, 0, 0], "widths"),
    ("outputs", 7, [-1, 0, 0, 0, 0], "which"),
    ("outputs", 8, [4, 0, 0, 0, 0], "sources"),
    ("outputs", 9, [0, 0, 1, 2, 3], "targets"),
    ("outputs", 3, lambda w: w[:, 1:], "weights"),
    ("residual", 4, [2, 0, 0, 0], "which"),
    ("residual", 3, [3, 0, 0, 0], "sources"),
    ("losses", 2, lambda t: t[1:], "targets"),
    ("losses", 1, lambda h: h[:, 1:], "weight"),
]


@pytest.mark.parametrize(("case", "at", "value", "field"), BAD)
def test_bad_input_is_named(case, at, value, field):
    name, arguments = changed(case, at, value)
    with pytest.raises(InputError) as caught:
        getattr(torch.ops.ppf, name)(*arguments)
    assert caught.value.field == field


def test_sources_of_others_are_not_overwritten():
    _, x, *others = outputs_case(torch.float32)
    with pytest.raises(InputError, match="overwrite sources"):
        torch.ops.ppf.grouped_outputs(x, x, *others[:3], [0, 1], [8, 8], [0, 0], [0, 1], [1, 0], 1.0)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly here")
def test_kernels_under_the_interpreter():
    interpreted(__file__)
