"""The native tile kernel for lists of rows on Hopper: both forms against fp64, with what is pruned set to NaN."""

import pytest
import torch
from masked_cases import listed, mlp, normal, poisoned, product, within_twice

from ppf.fast.ops import dispatch, many_tokens
from ppf.fast.ops.masked_linear import masked_linear
from ppf.fast.ops.selection import PREFIX, UNIQUE, Selection

pytestmark = pytest.mark.gpu
PAIRS = [0, 128, 144, 160, 176, 192, 208, 224, 240, 256]


@pytest.fixture(autouse=True)
def native():
    if not many_tokens.apply(torch.zeros(1, 8, dtype=torch.bfloat16, device="cuda")):
        pytest.skip("built without CUDA, or not Hopper")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", PAIRS)
def test_gate_and_up(wide, dtype):
    """Ragged in tokens, channels and contraction; more tiles than multiprocessors."""
    for tokens, channels, kept, depth in ((300, 900, 777, 200), (17, 300, 1, 64), (1500, 2000, 1201, 136)):
        x = normal(tokens, depth, dtype=dtype) * depth**0.5
        gate, up = normal(channels, depth, dtype=dtype), normal(channels, depth, dtype=dtype)
        index = listed(kept, channels)
        rows = [w.index_select(0, index) for w in (gate, up)]
        y = many_tokens.gate_up(x, poisoned(gate, index, 0), poisoned(up, index, 0), index, kept, wide)
        assert within_twice(y, mlp(x, *rows), mlp(x.double(), *(w.double() for w in rows)))


@pytest.mark.parametrize("wide", [0, 128, 160, 192, 224, 256])
def test_outputs(wide):
    for tokens, outputs, kept, depth in ((290, 1000, 501, 1000), (1, 70, 33, 8), (3000, 1024, 1024, 512)):
        x, weight = normal(tokens, depth) * depth**0.5, normal(outputs, depth)
        index = listed(kept, outputs)
        y = many_tokens.outputs(x, poisoned(weight, index, 0), index, kept, wide=wide)
        assert within_twice(y, *product(x, weight.index_select(0, index)))
        y = many_tokens.outputs(x, weight, None, kept, wide=wide)
        assert within_twice(y, *product(x, weight[:kept]))


def test_one_wrong_row_is_noticed():
    x, weight = normal(200, 256) * 16, normal(500, 256)
    index = listed(300, 500)
    wrong = index.clone()
    wrong[123] = (wrong[123] + 1) % 500
    y = many_tokens.outputs(x, weight, wrong, 300)
    assert not within_twice(y, *product(x, weight.index_select(0, index)))


@pytest.mark.parametrize("kept", [0, 300])
def test_unsorted_duplicates_misaligned_and_strided(kept):
    """A list in any order; x that has to be copied first; weights whose rows do not start on 16 bytes go elsewhere."""
    x, weight = (normal(270, 2 * 256) * 16)[:, ::2], normal(500, 256)
    index = torch.cat((listed(kept // 2, 500), listed(kept - kept // 2, 500)))
    y = masked_linear(x, weight, Selection.indices(index.tolist(), 500))
    assert y.shape == (270, kept) and (not kept or within_twice(y, *product(x, weight.index_select(0, index))))
    odd = normal(500, 257)[:, 1:]
    assert not many_tokens.apply(x.contiguous(), odd)
    y = masked_linear(x, odd, Selection.indices(index.tolist(), 500))
    assert not kept or within_twice(y, *product(x, odd.index_select(0, index)))


def test_the_dispatch_takes_it():
    x, gate, up = normal(256, 512), normal(900, 512), normal(900, 512)
    assert dispatch.hidden_path(x, gate, up, UNIQUE, 450) == "native"
    assert dispatch.hidden_path(x[:64], gate, up, UNIQUE, 450) == "tiles"
    assert dispatch.linear_path(x, gate, UNIQUE, 450, PREFIX, 512, False) == "native"
    assert dispatch.linear_path(x, gate, PREFIX, 900, PREFIX, 512, False) == "library"
