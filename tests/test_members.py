"""The ops of batched evaluation: references against plain attention and FFN, kernels against the references."""

from functools import partial

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, INTERPRETED, error, interpreted, on_kernels

from ppf.fast.ops import members as ops

# The interpreter takes a twentieth of a second for a tile: there are fewer there, and ragged ones all the same.
LENGTH, SEQUENCES, HIDDEN, CHANNELS, GROUPS = 35 if INTERPRETED else 40, 2 if INTERPRETED else 3, 64, 96, 3
TOKENS = LENGTH * SEQUENCES
FEW = (1, 0, 2) if INTERPRETED else (3, 0, 1, 2)  # kv-groups that members keep
SMALL = {"BM": 32, "num_warps": 4, "num_stages": 1}


def draw(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def table(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def norm_of(size, dtype):
    return 1 + draw(size, dtype=dtype, scale=0.2)


def project_case(dtype, full=False, heads=2, d=16):
    """``full``: with all that a family may have, and norms in fp32."""
    x, norm = draw(4, TOKENS, HIDDEN, dtype=dtype), norm_of(HIDDEN, torch.float32 if full else dtype)
    weight = draw(GROUPS * (heads + 2) * d, HIDDEN, dtype=dtype, scale=HIDDEN**-0.5)
    bias, head_norm = None, None
    if full:
        bias, head_norm = draw(len(weight), dtype=dtype), 2 * norm_of((heads + 2) * d, torch.float32)
        head_norm[-d:] = 1
    angle = torch.arange(LENGTH)[:, None] * 0.3 ** torch.arange(d // 2)
    cos, sin = angle.cos().to(DEVICE), angle.sin().to(DEVICE)
    return x, norm, weight, bias, head_norm, cos, sin, table(3, 0, 1, 2), LENGTH, (heads + 2) * d, 1e-5


def attention_case(dtype, window=0, length=LENGTH, sequences=SEQUENCES, heads=2, d=16, levels=(3, 0, 1, 2)):
    qkv = draw(len(levels), sequences * length, GROUPS * (heads + 2) * d, dtype=dtype)
    return qkv, table(*levels), length, heads, d, d**-0.5, window


def mix_case(dtype, biased=False, sandwiched=False, unit=32, multiple=24):
    norm_dtype = torch.float32 if sandwiched else dtype
    levels = CHANNELS // multiple + 1
    x, inner = draw(2, TOKENS, HIDDEN, dtype=dtype), draw(2, TOKENS, unit * GROUPS, dtype=dtype)
    o = draw(GROUPS + 1, HIDDEN, unit * GROUPS, dtype=dtype, scale=0.1)
    down = draw(levels, HIDDEN, CHANNELS, dtype=dtype, scale=0.1)
    gate_up = draw(2 * CHANNELS, HIDDEN, dtype=dtype, scale=HIDDEN**-0.5)
    biases = (draw(n, dtype=dtype) if biased else None for n in (HIDDEN, 2 * CHANNELS, HIDDEN))
    afters = (norm_of(HIDDEN, norm_dtype) if sandwiched else None for _ in range(2))
    tables = table(0, 1, 1, 0, 0), table(3, 0, 1, 2, 0), table(4, 1, 0, 3, 0)
    activation = "gelu_pytorch_tanh" if sandwiched else "silu"
    return (
        x, inner, o, next(biases), next(afters), norm_of(HIDDEN, norm_dtype), gate_up, next(biases), down,
        next(biases), next(afters), *tables, unit, multiple, 1e-5, activation,
    )  # fmt: skip


def losses_case(dtype, norm_dtype=None, vocabulary=150):
    head = draw(vocabulary, HIDDEN, dtype=dtype, scale=0.3)
    targets = torch.randint(0, vocabulary, (TOKENS,), device=DEVICE)
    return draw(3, TOKENS, HIDDEN, dtype=dtype), norm_of(HIDDEN, norm_dtype or dtype), head, targets, LENGTH, 1e-5


# Windows within a tile, and so long that all queries see some tiles whole: 50 of the small tiles, 150 of the default.
CASES = {
    "project": project_case,
    "project, all": partial(project_case, full=True),
    "project, heads of 32": partial(project_case, full=True, d=32),
    "attention": attention_case,
    "attention, window 3": partial(attention_case, window=3, levels=FEW),
    "attention, window 50": partial(attention_case, window=50, length=70, sequences=1, levels=FEW),
    "attention, window 150": partial(attention_case, window=150, length=260, sequences=2),
    "mix": mix_case,
    "mix, biases": partial(mix_case, biased=True),
    "mix, sandwich": partial(mix_case, sandwiched=True),
    "mix, all": partial(mix_case, biased=True, sandwiched=True),
    "losses": losses_case,
    "losses, fp32 norm": partial(losses_case, norm_dtype=torch.float32),
}
TILES = {
    "project": {"BN": 32}, "attention": {"BM": 32, "BN": 16}, "mix": {"BK": 32, "BC": 16}, "losses": {"BV": 64},
}  # fmt: skip
# Where every op has what may be left out, and what stands there then.
OPTIONAL = {
    "project": {3: None, 4: None},
    "attention": {6: 0},
    "mix": {3: None, 4: None, 7: None, 9: None, 10: None, 17: "silu"},
    "losses": {},
}


def exact(name, arguments):
    """The reference in fp64 on the same operands."""
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    return getattr(ops, f"{name}_reference")(*wide)


def defined(width, level):
    """Which columns of q, k and v or of the attention's output are a member's own, bool [D, 1, width]."""
    return torch.arange(width, device=DEVICE) < level[:, None, None] * (width // GROUPS)


def kept(name, arguments, value):
    """Of q, k, v and the attention's output, what is defined: zero past the width, as the references have it."""
    if name not in ("project", "attention"):
        return value
    level = arguments[7] if name == "project" else arguments[1]
    return torch.where(defined(value.shape[2], level), value, 0)


def wrong_arguments(name, arguments):
    """With another member's tables, and with each optional thing left out."""
    tables = [a.flip(0) if isinstance(a, torch.Tensor) and not a.is_floating_point() else a for a in arguments]
    yield tables
    for at, missing in OPTIONAL[name].items():
        if arguments[at] is not missing and arguments[at] != missing:
            yield [*arguments[:at], missing, *arguments[at + 1 :]]


@on_kernels
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", ["small", "default"])
def test_kernels_are_as_exact_as_torch(case, dtype, tiles):
    from ppf.kernels import members

    if INTERPRETED and (tiles == "default" or case.endswith("150")):
        pytest.skip("the default tiles are for GPUs, and the interpreter is slow")
    name = case.split(",")[0]
    config = None if tiles == "default" else SMALL | TILES[name]
    torch.manual_seed(0)
    arguments = CASES[case](dtype)
    given = list(arguments)
    if name == "attention":  # what lies past the width is anything, NaN too
        given[0] = torch.where(defined(given[0].shape[2], given[1]), given[0], torch.nan).contiguous()
    got = getattr(members, name)(*given, config=config)
    found, wanted = kept(name, arguments, got), exact(name, arguments)
    torchs = kept(name, arguments, getattr(ops, f"{name}_reference")(*arguments))
    floor = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}[dtype]
    assert error(found, wanted) <= 2 * max(error(torchs, wanted), floor / 2)
    # Negative control: what another member has, or another family, gives another result.
    for wrong in wrong_arguments(name, arguments):
        assert error(exact(name, wrong), wanted) > 0.01


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly here")
def test_kernels_under_the_interpreter():
    interpreted(__file__)
