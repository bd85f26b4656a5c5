"""The native tile kernel for lists of rows on Hopper: every form against fp64, with what is pruned set to NaN."""

import pytest
import torch
from masked_cases import listed, mlp, normal, poisoned, product, within_twice

from ppf.ops import many_tokens

pytestmark = pytest.mark.gpu
PAIRS = [0, 128, 144, 160, 176, 192, 208, 224, 240, 256]


@pytest.fixture(autouse=True)
def native():
    if not many_tokens.apply(torch.zeros(1, 8, dtype=torch.bfloat16, device="cuda"), 8):
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


@pytest.mark.parametrize("wide", [0, 128, 256])
@pytest.mark.parametrize("kept", [1, 9, 700])
def test_listed_input_blocks(kept, wide):
    """Also more than one batch of looked-up blocks."""
    weight = normal(264, 64 * (kept + 3))
    blocks = listed(kept, kept + 3)
    columns = (blocks[:, None] * 64 + torch.arange(64, device="cuda")).flatten()
    x = normal(140, kept * 64) * (kept * 64) ** 0.5
    y = many_tokens.outputs(x, poisoned(weight, columns, 1), None, 264, blocks, wide)
    assert within_twice(y, *product(x, weight.index_select(1, columns)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [0, 128, 256])
def test_listed_units(wide, dtype):
    """Over several batches of looked-up units, and where the last step is not full."""
    for tokens, units, kept, columns in ((290, 3000, 2088, 1000), (40, 90, 8, 72), (2000, 1100, 1032, 2048)):
        x, stored = normal(tokens, kept, dtype=dtype) * kept**0.5, normal(units, columns, dtype=dtype)
        index = listed(kept, units)
        y = many_tokens.units(x, poisoned(stored, index, 0), index, columns, wide)
        assert within_twice(y, *product(x, stored.index_select(0, index).t()))
        y = many_tokens.units(x, stored, None, columns, wide)
        assert within_twice(y, *product(x, stored[:kept].t()))


def test_one_wrong_row_is_noticed():
    x, weight = normal(200, 256) * 16, normal(500, 256)
    index = listed(300, 500)
    wrong = index.clone()
    wrong[123] = (wrong[123] + 1) % 500
    y = many_tokens.outputs(x, weight, wrong, 300)
    assert not within_twice(y, *product(x, weight.index_select(0, index)))
