"""Rotation, silu·mul and token losses: kernels against fp64, beside torch's own result."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, INTERPRETED, interpreted, on_kernels, within_twice

from ppf.fast.ops import elementwise as ops


def draw(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(DEVICE)


def angles(length, d, dtype):
    angle = torch.arange(length)[:, None] * 0.3 ** torch.arange(d // 2)
    return [turn.repeat(1, 2).to(dtype).to(DEVICE).contiguous() for turn in (angle.cos(), angle.sin())]


def rotate_case(dtype, heads, d):
    wide = draw(2, 9, heads * d + 8, dtype=dtype)  # a prefix of a wider product: rows are not packed
    return wide[..., : heads * d].unflatten(-1, (heads, d)), *angles(9, d, dtype)


def losses_case(dtype, vocabulary):
    return 10 * draw(6, vocabulary, dtype=dtype), torch.randint(0, vocabulary, (6,), device=DEVICE)


CASES = {
    "rotate": [lambda t: rotate_case(t, 1, 64), lambda t: rotate_case(t, 5, 24)],
    "silu_mul": [
        lambda t: (draw(3, 7, 100, dtype=t), draw(3, 7, 100, dtype=t)),
        lambda t: (draw(1, dtype=t),) * 2,
        lambda t: (draw(5, 1500, dtype=t)[:, :1303], draw(5, 1303, dtype=t)),  # a prefix of a wider product
        lambda t: (draw(9, 77, dtype=t)[::2, 3:70], draw(5, 80, dtype=t)[:, 13:]),  # neither starts on 16 bytes
    ],
    "losses": [lambda t: losses_case(t, 3), lambda t: losses_case(t, 5000)],
}


@on_kernels
@pytest.mark.parametrize(("name", "case"), [(name, case) for name, made in CASES.items() for case in range(len(made))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_as_exact_as_torch(name, dtype, case):
    from ppf.kernels import elementwise

    arguments = CASES[name][case](dtype)
    reference = getattr(ops, {"losses": "row_losses"}.get(name, name) + "_reference")
    exact = reference(*(a.double() if a.is_floating_point() else a for a in arguments))
    if name == "losses":  # the reference works in fp32: do it again in fp64
        exact = torch.nn.functional.cross_entropy(arguments[0].double(), arguments[1], reduction="none")
    got = getattr(elementwise, name)(*arguments)
    assert within_twice(got, reference(*arguments), exact)
    wrong = reference(arguments[0].roll(1, -1), *arguments[1:])
    assert arguments[0].shape[-1] == 1 or not within_twice(wrong, reference(*arguments), exact)


@pytest.mark.parametrize("name", ["rotate", "silu_mul", "row_losses"])
def test_ops_are_well_formed(name):
    for case in CASES[{"row_losses": "losses"}.get(name, name)]:
        torch.library.opcheck(getattr(torch.ops.ppf, name).default, case(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_silu_mul_takes_any_layout(dtype):
    """What no kernel serves takes the reference: rows with gaps inside, no element, fp64."""
    wide = draw(6, 40, dtype=dtype)
    for gate, up in ((wide[:, ::2], wide[:, 1::2]), (wide.t(), wide.t()), (wide[:0], wide[:0]), (wide[:, :0],) * 2):
        exact = ops.silu_mul_reference(gate.double(), up.double())
        assert within_twice(torch.ops.ppf.silu_mul(gate, up), ops.silu_mul_reference(gate, up), exact)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly here")
def test_kernels_under_the_interpreter():
    interpreted(__file__)
