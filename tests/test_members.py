"""The ops of batched evaluation: references against plain attention and FFN, kernels against the references."""

import pytest
import torch
from masked_cases import DEVICE, DTYPES, INTERPRETED, error, interpreted, on_kernels

from ppf.fast.ops import members as ops

LENGTH, SEQUENCES, HIDDEN, CHANNELS = 40, 3, 64, 96
TOKENS = LENGTH * SEQUENCES
SMALL = {"BM": 32, "num_warps": 4, "num_stages": 1}


def draw(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def table(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def project_case(dtype, heads=2, d=16, groups=3):
    x, norm = draw(4, TOKENS, HIDDEN, dtype=dtype), 1 + draw(HIDDEN, dtype=dtype, scale=0.2)
    weight = draw(groups * (heads + 2) * d, HIDDEN, dtype=dtype, scale=HIDDEN**-0.5)
    angle = torch.arange(LENGTH)[:, None] * 0.3 ** torch.arange(d // 2)
    cos, sin = angle.cos().to(DEVICE), angle.sin().to(DEVICE)
    return x, norm, weight, cos, sin, table(3, 0, 1, 2), LENGTH, (heads + 2) * d, 1e-5


def attention_case(dtype, heads=2, d=16, groups=3):
    qkv = draw(4, TOKENS, groups * (heads + 2) * d, dtype=dtype)
    return qkv, table(3, 0, 1, 2), LENGTH, heads, d


def mix_case(dtype, unit=32, groups=3, multiple=24):
    levels = CHANNELS // multiple + 1
    x, inner = draw(2, TOKENS, HIDDEN, dtype=dtype), draw(2, TOKENS, unit * groups, dtype=dtype)
    o = draw(groups + 1, HIDDEN, unit * groups, dtype=dtype, scale=0.1)
    down = draw(levels, HIDDEN, CHANNELS, dtype=dtype, scale=0.1)
    gate_up = draw(2 * CHANNELS, HIDDEN, dtype=dtype, scale=HIDDEN**-0.5)
    norm = 1 + draw(HIDDEN, dtype=dtype, scale=0.2)
    tables = table(0, 1, 1, 0, 0), table(3, 0, 1, 2, 0), table(4, 1, 0, 3, 0)
    return x, inner, o, norm, gate_up, down, *tables, unit, multiple, 1e-5


def losses_case(dtype, vocabulary=150):
    head = draw(vocabulary, HIDDEN, dtype=dtype, scale=0.3)
    targets = torch.randint(0, vocabulary, (TOKENS,), device=DEVICE)
    return draw(3, TOKENS, HIDDEN, dtype=dtype), 1 + draw(HIDDEN, dtype=dtype, scale=0.2), head, targets, LENGTH, 1e-5


CASES = {"project": project_case, "attention": attention_case, "mix": mix_case, "losses": losses_case}
TILES = {
    "project": {"BN": 32}, "attention": {"BM": 32, "BN": 16}, "mix": {"BK": 32, "BC": 16}, "losses": {"BV": 64},
}  # fmt: skip


def exact(name, arguments):
    """The reference in fp64 on the same operands."""
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    return getattr(ops, f"{name}_reference")(*wide)


def kept(name, arguments, value):
    """Of q, k, v and the attention's output, what is defined: zero past the width, as the references have it."""
    if name not in ("project", "attention"):
        return value
    level = arguments[5] if name == "project" else arguments[1]
    groups = 3
    unit = value.shape[2] // groups
    column = torch.arange(value.shape[2], device=value.device)
    return torch.where(column[None, None] < level[:, None, None] * unit, value, 0)


@on_kernels
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", ["small", "default"])
def test_kernels_are_as_exact_as_torch(name, dtype, tiles):
    from ppf.kernels import members

    if INTERPRETED and tiles == "default":
        pytest.skip("the default tiles are for GPUs")
    config = None if tiles == "default" else SMALL | TILES[name]
    torch.manual_seed(0)
    arguments = CASES[name](dtype)
    if name == "attention":  # what lies past the width is anything, NaN too
        qkv, level = arguments[:2]
        unit = qkv.shape[2] // 3
        qkv = torch.where(
            torch.arange(qkv.shape[2], device=DEVICE) < level[:, None, None] * unit, qkv, torch.nan
        ).contiguous()
        got = members.attention(qkv, *arguments[1:], config=config)
    else:
        got = getattr(members, name)(*arguments, config=config)
    found, wanted = kept(name, arguments, got), exact(name, arguments)
    torchs = kept(name, arguments, getattr(ops, f"{name}_reference")(*arguments))
    floor = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}[dtype]
    assert error(found, wanted) <= 2 * max(error(torchs, wanted), floor / 2)
    # Negative control: another member's tables give another result.
    wrong = list(arguments)
    for at, value in enumerate(arguments):
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            wrong[at] = value.flip(0)
    assert error(exact(name, wrong), wanted) > 0.01


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly here")
def test_kernels_under_the_interpreter():
    interpreted(__file__)
