"""The ops of a decode step: Triton kernels against fp64, within twice torch's own error; references everywhere."""

from __future__ import annotations

import pytest
import torch
from masked_cases import DEVICE, DTYPES, INTERPRETED, interpreted, on_kernels, within_twice
from torch import Tensor

from ppf.fast.ops import decode

HIDDEN, CHANNELS, D = 96, 72, 16
SHAPES = {"mha": (3, 1), "gqa": (2, 3)}  # kv-groups, query heads a group
TOKENS = [1, 3, 17, 64]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def wide(tensors: list) -> list:
    """The same arguments in fp64, each its own memory."""
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


def copies(tensors: list) -> list:
    return [t.clone() if isinstance(t, Tensor) else t for t in tensors]


def compare(op: str, arguments: list, written: tuple[int, ...]) -> None:
    """An op's result and the arguments it writes, against its reference in the same dtype and in fp64."""
    reference = getattr(decode, f"{op}_reference")
    got, torchs, exact = copies(arguments), copies(arguments), wide(arguments)
    results = [f(*a) for f, a in ((getattr(torch.ops.ppf, f"decode_{op}"), got), (reference, torchs))]
    results.append(reference(*exact))
    if results[0] is not None:
        assert within_twice(*results)
    for index in written:
        assert within_twice(got[index], torchs[index], exact[index])


def angles(length: int) -> list[Tensor]:
    angle = torch.outer(torch.arange(length), 10000 ** (-torch.arange(0, D, 2) / D))
    return [angle.cos().to(DEVICE), angle.sin().to(DEVICE)]


def starts(tokens: int, position: int) -> Tensor:
    return (torch.arange(tokens, dtype=torch.int32) * 5 % (position + 1)).to(DEVICE)


def qkv_arguments(tokens: int, shape: str, dtype: torch.dtype, position: int = 9) -> list:
    groups, group = SHAPES[shape]
    x, gain = normal(tokens, HIDDEN, dtype=dtype), 1 + normal(HIDDEN, dtype=dtype, scale=0.2)
    # As views of one matrix, k and v start anywhere relative to q.
    rows = normal((group + 2) * groups * D, HIDDEN, dtype=dtype, scale=HIDDEN**-0.5)
    weights = rows.split([group * groups * D, groups * D, groups * D])
    caches = [normal(tokens, groups, 16, D, dtype=dtype, seed=s) for s in (1, 2)]
    at = torch.tensor([position], dtype=torch.int32, device=DEVICE)
    return [x, gain, *weights, *angles(16), starts(tokens, position), at, *caches, 1e-5]


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_qkv_kernel(tokens, shape, dtype):
    compare("qkv", qkv_arguments(tokens, shape, dtype), written=(9, 10))


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tokens", "position", "shares"), [(1, 0, 1), (1, 130, 4), (3, 199, 8), (2, 70, 2)])
def test_attention_kernel(tokens, position, shares, shape, dtype):
    """Also positions that hold NaN outside a sequence's own, and more shares than there are positions."""
    from ppf.kernels.decode_attention import workspace

    groups, group = SHAPES[shape]
    q = normal(tokens, groups * group * D, dtype=dtype)
    caches = [normal(tokens, groups, 200, D, dtype=dtype, seed=s) for s in (1, 2)]
    start, at = starts(tokens, position), torch.tensor([position], dtype=torch.int32, device=DEVICE)
    for cache in caches:
        cache[:, :, position + 1 :] = float("nan")
        for row, first in enumerate(start.tolist()):
            cache[row, :, :first] = float("nan")
    space = workspace(tokens, groups, group, D, shares, q.device)
    arguments = [q, *caches, start, at, *space, shares, D**-0.5]
    for _ in range(2):  # the counters are as they were
        compare("attention", arguments, written=())


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_linear_kernels(tokens, dtype):
    """Weights that are prefixes of a wider matrix, as an elastic model has them."""
    x, gain = normal(tokens, HIDDEN, dtype=dtype), 1 + normal(HIDDEN, dtype=dtype, scale=0.2)
    gate, up = (normal(CHANNELS, HIDDEN, dtype=dtype, seed=s, scale=HIDDEN**-0.5) for s in (1, 2))
    compare("gate_up", [x, gain, gate, up, 1e-5], written=())
    act = normal(tokens, CHANNELS, dtype=dtype)
    down = normal(HIDDEN, CHANNELS + 24, dtype=dtype, scale=CHANNELS**-0.5)[:, :CHANNELS]
    compare("add_linear", [act, down, x], written=(2,))
    logits = torch.zeros(tokens, CHANNELS, device=DEVICE)
    compare("head", [x, gain, gate, logits, 1e-5], written=(3,))


@on_kernels
@pytest.mark.parametrize("width", [50, 9000])
def test_select_kernel(width):
    """Equal maxima: the first; ended sequences: the padding; ends; the position."""
    logits = normal(4, width)
    logits[1, 7] = logits[1, 40] = logits.max() + 1
    eos = torch.tensor([7, *[-1] * 7], device=DEVICE)
    finished = torch.tensor([0, 0, 1, 0], dtype=torch.int8, device=DEVICE)
    token, position = (
        torch.zeros(4, dtype=torch.int64, device=DEVICE),
        torch.tensor([5], dtype=torch.int32, device=DEVICE),
    )
    decode._select_cuda(logits, eos, torch.tensor(3, device=DEVICE), finished, token, position)
    best = logits.argmax(-1).tolist()
    assert token.tolist() == [best[0], 7, 3, best[3]] and finished.tolist() == [best[0] == 7, 1, 1, best[3] == 7]
    assert position.tolist() == [6]
    with_reference = [finished.clone().zero_(), token.clone(), position.clone()]
    decode.select_reference(logits, eos, torch.tensor(3, device=DEVICE), *with_reference)
    assert with_reference[1].tolist() == best


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary_kernel(shape, dtype):
    groups, group = SHAPES[shape]
    q = normal(2 * 7, groups * group * D, dtype=dtype)
    k, v = (normal(2 * 7, groups * D, dtype=dtype, seed=s) for s in (1, 2))
    caches = [normal(2, groups, 9, D, dtype=dtype, seed=s) for s in (3, 4)]
    compare("rotary", [q, k, v, *angles(9), starts(2, 5), *caches], written=(0, 6, 7))


def test_schemas_and_fakes():
    """What each op writes is what its schema says, and its fake gives the shapes that it gives."""
    x, gain, weight = normal(3, HIDDEN), normal(HIDDEN), normal(CHANNELS, HIDDEN)
    q, k = normal(6, 3 * D), normal(6, D)
    caches = [normal(3, 3, 16, D), normal(3, 3, 16, D, seed=1)]
    position = torch.tensor([9], dtype=torch.int32, device=DEVICE)
    shares, space = decode.workspace(3, 3, 1, D, 16, x.device)
    flags = torch.zeros(3, dtype=torch.int8, device=DEVICE)
    numbers = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    calls = {
        "qkv": qkv_arguments(3, "gqa", torch.float32),
        "attention": [normal(3, 3 * D), *caches, starts(3, 9), position, *space, shares, 0.25],
        "gate_up": [x, gain, weight, normal(CHANNELS, HIDDEN, seed=1), 1e-5],
        "add_linear": [x, weight, normal(3, CHANNELS)],
        "head": [x, gain, weight, normal(3, CHANNELS), 1e-5],
        "multiply_silu": [q, normal(6, 3 * D, seed=1)],
        "rotary": [q, k, k + 1, *angles(16), starts(2, 1), *(c[:2, :1] for c in caches)],
        "select": [normal(3, 50), numbers - 1, numbers[0].clone(), flags, numbers[:3].clone(), position.clone()],
    }
    assert {f"decode_{name}" for name in calls} == set(decode._OPS)
    for name, arguments in calls.items():
        op = getattr(torch.ops.ppf, f"decode_{name}").default
        torch.library.opcheck(op, tuple(copies(arguments)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly here")
def test_kernels_under_the_interpreter():
    interpreted(__file__)
