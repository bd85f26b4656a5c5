"""The ops of a decode step: Triton kernels against fp64, within twice torch's own error; references everywhere."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, INTERPRETED, interpreted, on_kernels, within_twice
from torch import Tensor

from ppf.fast.ops import decode

HIDDEN, CHANNELS = 96, 72
SHAPES = {"mha": (3, 1, 16), "gqa": (2, 3, 24)}  # kv-groups, query heads a group, head size
# Not 2 to 4: on a CPU torch multiplies so few rows in another order, twice as exact as any one sum over the depth.
TOKENS = [1, 17, 64] if INTERPRETED else [1, 5, 17, 64]
# Tokens, position, shares, window: more shares than there are positions, windows of one position, and of more than
# there are; a last share that is empty, and one that is not. Each share of a group takes the interpreter long.
SEEN = [(1, 0, 1, 0), (2, 130, 4, 0), (1, 130, 4, 1), (1, 199, 2, 150), (2, 5, 2, 64)]
if not INTERPRETED:
    SEEN += [(1, 130, 4, 0), (2, 199, 8, 0), (3, 70, 2, 0), (2, 199, 2, 67)]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def wide(tensors: list) -> list:
    """The same arguments in fp64, each its own memory."""
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


def copies(tensors: list) -> list:
    """The same arguments; views of one memory are views of one again."""
    memory: dict[int, torch.UntypedStorage] = {}

    def copy(x: Tensor) -> Tensor:
        own = x.untyped_storage()
        clone = memory.setdefault(own.data_ptr(), own.clone())
        return torch.empty(0, dtype=x.dtype, device=x.device).set_(clone, x.storage_offset(), x.shape, x.stride())

    return [copy(t) if isinstance(t, Tensor) else t for t in tensors]


def compare(op: str, arguments: list, written: tuple[int, ...]) -> None:
    """An op's result and the arguments it writes, against its reference in the same dtype and in fp64."""
    # The interpreter's tensors are on the CPU, where the registered op would be the reference itself.
    reference, kernel, _ = decode._OPS[f"decode_{op}"]
    called = kernel if INTERPRETED else getattr(torch.ops.ppf, f"decode_{op}")
    got, torchs, exact = copies(arguments), copies(arguments), wide(arguments)
    results = [called(*got), reference(*torchs)]
    results.append(reference(*exact))
    if results[0] is not None:
        assert within_twice(*results)
    for index in written:
        assert within_twice(got[index], torchs[index], exact[index])


def angles(length: int, d: int) -> list[Tensor]:
    angle = torch.outer(torch.arange(length), 10000 ** (-torch.arange(0, d, 2) / d))
    return [angle.cos().to(DEVICE), angle.sin().to(DEVICE)]


def starts(tokens: int, position: int) -> Tensor:
    return (torch.arange(tokens, dtype=torch.int32) * 5 % (position + 1)).to(DEVICE)


def scalar(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int32, device=DEVICE)


def gains(d: int, dtype: torch.dtype) -> list[Tensor]:
    """Norms of queries and of keys."""
    return [1 + normal(d, dtype=dtype, seed=s, scale=0.3) for s in (6, 7)]


def qkv_arguments(
    tokens: int, shape: str, dtype: torch.dtype, biased: bool = False, rotate: bool = True, position: int = 9
) -> list:
    """Rows of x and of the weights are further apart than they are long."""
    groups, group, d = SHAPES[shape]
    x, gain = normal(tokens, HIDDEN + 8, dtype=dtype)[:, :HIDDEN], 1 + normal(HIDDEN, dtype=dtype, scale=0.2)
    # As views of one matrix, k and v start anywhere relative to q.
    sizes = [group * groups * d, groups * d, groups * d]
    weights = normal(sum(sizes), HIDDEN + 8, dtype=dtype, scale=HIDDEN**-0.5)[:, :HIDDEN].split(sizes)
    biases = normal(sum(sizes), dtype=dtype).split(sizes) if biased else [None] * 3
    caches = [normal(tokens, groups, 16, d, dtype=dtype, seed=s) for s in (1, 2)]
    turn = angles(16, d)
    return [
        x, gain, *weights, *biases, *turn, starts(tokens, position), scalar(position), *caches, 1e-5, rotate,
    ]  # fmt: skip


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("biased", "rotate"), [(False, True), (True, False)] + [(True, True)] * (not INTERPRETED))
def test_qkv_kernel(biased, rotate, tokens, shape, dtype):
    compare("qkv", qkv_arguments(tokens, shape, dtype, biased, rotate), written=(12, 13))


def attention_arguments(
    tokens: int, position: int, shares: int, shape: str, dtype: torch.dtype, window: int = 0, heads: bool = False
) -> list:
    """Positions outside of what a sequence sees hold NaN."""
    from ppf.kernels.decode_attention import workspace

    groups, group, d = SHAPES[shape]
    q = normal(tokens, groups * group * d + 8, dtype=dtype)[:, : groups * group * d]
    caches = [normal(tokens, groups, 200, d, dtype=dtype, seed=s) for s in (1, 2)]
    start, at = starts(tokens, position), scalar(position)
    for cache in caches:
        cache[:, :, position + 1 :] = float("nan")
        for row, first in enumerate(start.tolist()):
            seen_from = max(first, position - window + 1) if window else first
            cache[row, :, :seen_from] = float("nan")
    space = workspace(tokens, groups, group, d, shares, q.device)
    told = [*gains(d, dtype), *angles(200, d)] if heads else [None] * 4
    return [q, *caches, start, at, *space, shares, d**-0.5, window, *told, 1e-5]


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "heads"), [("mha", True), ("gqa", False), ("gqa", True)] + [("mha", False)] * (not INTERPRETED)
)
@pytest.mark.parametrize(("tokens", "position", "shares", "window"), SEEN)
def test_attention_kernel(tokens, position, shares, window, heads, shape, dtype):
    arguments = attention_arguments(tokens, position, shares, shape, dtype, window, heads)
    kernel = decode._attention_cuda if INTERPRETED else torch.ops.ppf.decode_attention
    got, torchs, exact = copies(arguments), copies(arguments), wide(arguments)
    result = kernel(*got)
    assert within_twice(result, decode.attention_reference(*torchs), decode.attention_reference(*exact))
    keys = [given[1][:, :, position].clone() for given in (got, torchs, exact)]
    assert within_twice(*keys)
    got[1][:, :, position] = arguments[1][:, :, position]
    assert torch.equal(got[1].nan_to_num(7.0), arguments[1].nan_to_num(7.0))  # no other key has changed
    assert torch.equal(kernel(*got), result)  # the counters are as they were


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_linear_kernels(tokens, dtype):
    """Weights that are prefixes of a wider matrix, as an elastic model has them."""
    x, gain = normal(tokens, HIDDEN, dtype=dtype), 1 + normal(HIDDEN, dtype=dtype, scale=0.2)
    gate, up = (normal(CHANNELS, HIDDEN, dtype=dtype, seed=s, scale=HIDDEN**-0.5) for s in (1, 2))
    biases = [normal(n, dtype=dtype, seed=3) for n in (CHANNELS, CHANNELS, HIDDEN)]
    act = normal(tokens, CHANNELS, dtype=dtype)
    down = normal(HIDDEN, CHANNELS + 24, dtype=dtype, scale=CHANNELS**-0.5)[:, :CHANNELS]
    for gate_bias, up_bias, down_bias in ([None] * 3, biases, [None, biases[1], None]):
        compare("gate_up", [x, gain, gate, up, gate_bias, up_bias, 1e-5], written=())
        compare("add_linear", [act, down, down_bias, x], written=(3,))
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


def rotary_arguments(shape: str, dtype: torch.dtype, heads: bool) -> list:
    groups, group, d = SHAPES[shape]
    q = normal(2 * 7, groups * group * d + 8, dtype=dtype)[:, : groups * group * d]
    k, v = (normal(2 * 7, groups * d, dtype=dtype, seed=s) for s in (1, 2))
    caches = [normal(2, groups, 9, d, dtype=dtype, seed=s) for s in (3, 4)]
    norms = gains(d, dtype) if heads else [None, None]
    return [q, k, v, *norms, *angles(9, d), starts(2, 5), *caches, 1e-5]


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [False, True], ids=["plain", "heads"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary_kernel(shape, heads, dtype):
    compare("rotary", rotary_arguments(shape, dtype, heads), written=(0, 8, 9))


FORGOTTEN = {  # what a kernel must not leave out: how to call it, which argument to drop, what it then gets wrong
    "query bias": ("qkv", lambda t: qkv_arguments(3, "gqa", t, True), 5, None),
    "key bias": ("qkv", lambda t: qkv_arguments(3, "gqa", t, True), 6, 12),
    "value bias": ("qkv", lambda t: qkv_arguments(3, "gqa", t, True), 7, 13),
    "up bias": ("gate_up", lambda t: linear_arguments(t), 5, None),
    "window": ("attention", lambda t: attention_arguments(1, 130, 4, "gqa", t, 129), 10, None),
    "query norm": ("attention", lambda t: attention_arguments(2, 70, 2, "gqa", t, 0, True), 11, None),
    "key norm": ("attention", lambda t: attention_arguments(2, 70, 2, "gqa", t, 0, True), 12, 1),
    "prompt's query norm": ("rotary", lambda t: rotary_arguments("gqa", t, True), 3, 0),
    "prompt's key norm": ("rotary", lambda t: rotary_arguments("gqa", t, True), 4, 8),
}


def linear_arguments(dtype: torch.dtype) -> list:
    x, gate, up = normal(3, HIDDEN, dtype=dtype), *(normal(CHANNELS, HIDDEN, dtype=dtype, seed=s) for s in (1, 2))
    return [x, x[0] + 1, gate, up, *(normal(CHANNELS, dtype=dtype, seed=s) for s in (3, 4)), 1e-5]


@pytest.mark.parametrize("name", FORGOTTEN)
def test_what_is_forgotten_fails_the_rule(name):
    """Negative control of the tests above, with the references: one optional argument less fails the rule."""
    op, make, dropped, wrong = FORGOTTEN[name]
    pytest.importorskip("triton")
    reference, arguments = decode._OPS[f"decode_{op}"][0], make(torch.float32)
    if op == "attention":  # what the rule compares must be numbers
        arguments[1:3] = [cache.nan_to_num(2.0) for cache in arguments[1:3]]
    got, torchs, exact = copies(arguments), copies(arguments), wide(arguments)
    got[dropped] = 0 if isinstance(got[dropped], int) else None
    results = [reference(*a) for a in (got, torchs, exact)]
    found = results if wrong is None else [a[wrong] for a in (got, torchs, exact)]
    assert not within_twice(*found)


def test_schemas_and_fakes():
    """What each op writes is what its schema says, and its fake gives the shapes that it gives."""
    x, gain, weight = normal(3, HIDDEN), normal(HIDDEN), normal(CHANNELS, HIDDEN)
    groups, group, d = SHAPES["gqa"]
    q, k = normal(6, 3 * d), normal(6, d)
    caches = [normal(3, 3, 16, d), normal(3, 3, 16, d, seed=1)]
    position = scalar(9)
    shares, space = decode.workspace(3, 3, 1, d, 16, x.device)
    heads = [*gains(d, torch.float32), *angles(16, d)]
    flags = torch.zeros(3, dtype=torch.int8, device=DEVICE)
    numbers = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    calls = {
        "qkv": qkv_arguments(3, "gqa", torch.float32, biased=True),
        "attention": [normal(3, 3 * d), *caches, starts(3, 9), position, *space, shares, 0.25, 4, *heads, 1e-5],
        "gate_up": [x, gain, weight, normal(CHANNELS, HIDDEN, seed=1), normal(CHANNELS), None, 1e-5],
        "add_linear": [x, weight, None, normal(3, CHANNELS)],
        "head": [x, gain, weight, normal(3, CHANNELS), 1e-5],
        "rotary": [q, k, k + 1, *heads, starts(2, 1), *(c[:2, :1] for c in caches), 1e-5],
        "select": [normal(3, 50), numbers - 1, numbers[0].clone(), flags, numbers[:3].clone(), position.clone()],
    }
    assert {f"decode_{name}" for name in calls} == set(decode._OPS)
    for name, arguments in calls.items():
        op = getattr(torch.ops.ppf, f"decode_{name}").default
        torch.library.opcheck(op, tuple(copies(arguments)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly here")
def test_kernels_under_the_interpreter():
    interpreted(__file__)
