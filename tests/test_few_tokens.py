"""The native kernels for 1 to 16 tokens: every form against fp64, with what is pruned set to NaN."""

import pytest
import torch
from masked_cases import listed, mlp, normal, poisoned, product, within_twice

from ppf.ops import few_tokens

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def native():
    if not few_tokens.apply(torch.zeros(1, 8, dtype=torch.bfloat16, device="cuda")):
        pytest.skip("built without CUDA, or a device before Hopper")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize(("outputs", "kept", "depth"), [(300, 151, 136), (2048, 1111, 4096), (9, 1, 8), (64, 64, 1528)])
def test_rows(outputs, kept, depth, tokens, dtype):
    index = listed(kept, outputs)
    x, weight = normal(tokens, depth, dtype=dtype) * depth**0.5, normal(outputs, depth, dtype=dtype)
    y = few_tokens.rows(x, (poisoned(weight, index, 0),), index, kept)
    assert within_twice(y, *product(x, weight.index_select(0, index)))
    y = few_tokens.rows(x, (weight,), None, kept)
    assert within_twice(y, *product(x, weight[:kept]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 8, 16])
def test_gate_and_up(tokens, dtype):
    x = normal(tokens, 512, dtype=dtype) * 512**0.5
    gate, up = normal(777, 512, dtype=dtype), normal(777, 512, dtype=dtype)
    index = listed(333, 777)
    kept = [w.index_select(0, index) for w in (gate, up)]
    wanted = mlp(x, *kept), mlp(x.double(), *(w.double() for w in kept))
    y = few_tokens.rows(x, (poisoned(gate, index, 0), poisoned(up, index, 0)), index, 333)
    assert within_twice(y, *wanted)
    y = few_tokens.rows(x, (gate, up), index, 333, spread=777)
    assert within_twice(y.index_select(1, index), *wanted)


@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_listed_inputs(tokens):
    """Single columns by mask, blocks by list; what the pruned columns of x and of the weight hold does not matter."""
    weight = normal(200, 1024)
    index = listed(500, 1024)
    x = normal(tokens, 500) * 500**0.5
    full = few_tokens.spread(x, index, 1024)
    mask = torch.zeros(1024, dtype=torch.int16, device="cuda").index_fill_(0, index.long(), -1)
    full[:, mask == 0] = float("nan")
    y = few_tokens.rows(full, (poisoned(weight, index, 1),), None, 200, mask=mask, dependent=True)
    assert within_twice(y, *product(x, weight.index_select(1, index)))
    blocks = listed(7, 16)
    columns = (blocks[:, None] * 64 + torch.arange(64, device="cuda")).flatten()
    x = normal(tokens, 448) * 448**0.5
    y = few_tokens.rows(x, (poisoned(weight, columns, 1),), None, 200, blocks=blocks)
    assert within_twice(y, *product(x, weight.index_select(1, columns)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16])
@pytest.mark.parametrize("sizes", [(500, 251, 200), (2048, 1001, 4096), (30, 1, 8), (700, 700, 72)])
def test_columns(sizes, tokens, dtype):
    units, kept, columns = sizes
    index = listed(kept, units)
    x, stored = normal(tokens, kept, dtype=dtype) * kept**0.5, normal(units, columns, dtype=dtype)
    y = few_tokens.columns(x, poisoned(stored, index, 0), index)
    assert within_twice(y, *product(x, stored.index_select(0, index).t()))
    assert torch.equal(y, few_tokens.columns(x, stored, index))
    y = few_tokens.columns(x, stored, None)
    assert within_twice(y, *product(x, stored[:kept].t()))


def test_operands_that_rows_of_16_bytes_cannot_cover():
    x, wide = normal(3, 64), normal(20, 72)
    assert few_tokens.apply(x, wide[:, :64]) and not few_tokens.apply(x, wide[:, 3:67], wide)
    assert not few_tokens.apply(x.float(), wide) and not few_tokens.apply(normal(17, 64), wide)
    misaligned = normal(3, 67)[:, 3:]
    assert within_twice(few_tokens.rows(misaligned, (wide[:, :64],), None, 20), *product(misaligned, wide[:, :64]))


def test_dependent_kernels_see_what_came_before_in_a_graph():
    """gate and up, then down, replayed many times on new input: the same bits as with a wait in between."""
    gate, up, down, turned = normal(2752, 1024), normal(2752, 1024), normal(1024, 2752), normal(2752, 1024)
    x = normal(1, 1024)

    def chain(wait: bool) -> tuple[torch.Tensor, torch.Tensor]:
        results = []
        for transposed in (False, True):
            hidden = few_tokens.rows(x, (gate, up), None, 2752)
            if wait:
                torch.cuda.synchronize()
            if transposed:
                results.append(few_tokens.columns(hidden, turned, None, dependent=not wait))
            else:
                results.append(few_tokens.rows(hidden, (down,), None, 1024, dependent=not wait))
        return results[0], results[1]

    chain(False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(False)
    for _ in range(50):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, chain(True), strict=True))
