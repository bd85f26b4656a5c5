"""The channel gather: bit-equal to index_select on every list and layout, and refuses bad input before it writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ppf import _C
from ppf.errors import InputError
from ppf.fast.ops import gather
from ppf.fast.ops.gather import (
    gather_columns,
    gather_columns_reference,
    gather_many,
    gather_rows,
    gather_rows_reference,
)
from ppf.fast.ops.index import Index

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPS = {0: (gather_rows, gather_rows_reference), 1: (gather_columns, gather_columns_reference)}
SHAPES = [(1, 1), (7, 33), (129, 151), (64, 4096), (300, 2056)]


def lists(size: int) -> dict[str, Tensor]:
    """Every kind of index list for a dimension of ``size``."""
    half = torch.randperm(size)[: max(1, size // 2)]
    heads = torch.arange(size).view(-1, 8)[::2].flatten() if size % 8 == 0 else torch.arange(0)
    return {
        "unsorted": half,
        "sorted": half.sort().values.int(),
        "three quarters": torch.randperm(size)[: size - size // 4].sort().values,
        "thin": torch.randperm(size)[: max(1, size // 40)].sort().values,
        "duplicates": torch.randint(0, size, (size + 3,)),
        "full": torch.arange(size),
        "reversed": torch.arange(size).flip(0),
        "prefix": torch.arange(max(1, size // 3), dtype=torch.int32),
        "shifted run": torch.arange(size // 3, size),
        "heads": heads,
        "empty": torch.empty(0, dtype=torch.int64),
        "strided list": torch.arange(size)[::2],
    }


def misaligned(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """A matrix that starts one element past an aligned address."""
    return torch.randn(rows * columns + 1, device=device).to(dtype)[1:].view(rows, columns)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", gather.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_index_select(shape, dtype, dim, device):
    x = torch.randn(shape, device=device).to(dtype)
    op, reference = OPS[dim]
    for name, index in lists(shape[dim]).items():
        expected = reference(x, index)
        for given in (index, Index(index, shape[dim])):
            found = op(x, given)
            assert found.dtype == dtype and found.device == x.device and found.is_contiguous()
            assert torch.equal(found, expected), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_layout_is_read_in_place(dtype, dim, device):
    wide = torch.randn(130, 1031, device=device).to(dtype)
    layouts = {
        "misaligned": misaligned(130, 1027, dtype, device),
        "misaligned even rows": misaligned(130, 1024, dtype, device),
        "column slice": wide[:, :1000],
        "column slice at 3": wide[:, 3:1003],
        "row slice": wide[1::3],
        "transposed": wide.t(),
        "expanded": wide[:1].expand(50, 1031),
    }
    op, reference = OPS[dim]
    for layout, x in layouts.items():
        for name, index in lists(x.shape[dim]).items():
            assert torch.equal(op(x, index), reference(x, index)), (layout, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [0, 1])
def test_large_results(dim, device):
    """Beyond the sizes from which the CPU streams and uses threads, and a GPU needs more than one wave."""
    x = torch.randn(1500, 5003, device=device)
    op, reference = OPS[dim]
    for name, index in lists(x.shape[dim]).items():
        assert torch.equal(op(x, index), reference(x, index)), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [0, 1])
def test_one_wrong_index_is_noticed(dim, device):
    """Negative control: the check above fails if a single entry of the list is another channel."""
    x = torch.randn(64, 96, device=device).bfloat16()
    index = torch.randperm(x.shape[dim])[:32]
    wrong = index.clone()
    wrong[17] = (wrong[17] + 1) % x.shape[dim]
    op, reference = OPS[dim]
    assert not torch.equal(op(x, wrong), reference(x, index))


@pytest.mark.parametrize("device", DEVICES)
def test_empty_matrices(device):
    none = torch.empty(0, dtype=torch.int64)
    assert gather_rows(torch.empty(0, 5, device=device), none).shape == (0, 5)
    assert gather_columns(torch.empty(0, 5, device=device), torch.tensor([4, 1])).shape == (0, 2)
    assert gather_columns(torch.empty(5, 0, device=device), none).shape == (5, 0)
    assert gather_rows(torch.empty(5, 0, device=device), torch.tensor([4, 1])).shape == (2, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_many_in_one_call(device):
    """Mixed dtypes, shapes, dims and kinds of list, more jobs than one launch takes, one Index shared."""
    ffn = Index(torch.randperm(200)[:77], 200)
    heads = torch.arange(128).view(4, 32)[[2, 0]].flatten()
    jobs = []
    for layer in range(110):
        dtype = gather.DTYPES[layer % 3]
        jobs += [(torch.randn(200, 128, device=device).to(dtype), ffn, 0)]
        jobs += [(torch.randn(128, 200, device=device).to(dtype), ffn, 1)]
        jobs += [(torch.randn(64, 128, device=device).to(dtype), heads, 1)]
        jobs += [(misaligned(9, 131, dtype, device), torch.randperm(131)[: layer % 9], 1)]
    found = gather_many(jobs)
    assert len(found) == len(jobs)
    for out, (x, index, dim) in zip(found, jobs, strict=True):
        list_ = index.host if isinstance(index, Index) else index
        assert torch.equal(out, x.index_select(dim, list_.to(device)))
    assert gather_many([]) == []


@pytest.mark.parametrize("device", DEVICES)
def test_many_with_lists_checked_before(device):
    """The way past the dispatcher, and the jobs that must not take it: gradients, odd layouts, wrong lists."""
    ffn, heads = Index(torch.randperm(200)[:77], 200), Index(torch.arange(128).view(4, 32)[[2, 0]].flatten(), 128)
    x = [torch.randn(200, 128, device=device).bfloat16() for _ in range(40)]
    jobs = [(t, ffn, 0) for t in x] + [(t, heads, 1) for t in x] + [(t.t(), ffn, 1) for t in x[:3]]
    for part in (jobs[:80], jobs):
        for out, (t, index, dim) in zip(gather_many(part), part, strict=True):
            assert torch.equal(out, t.index_select(dim, index.host.to(device)))
    leaf = x[0].clone().requires_grad_()
    gather_many([*jobs, (leaf, ffn, 0)])[-1].sum().backward()
    assert leaf.grad[ffn.host.long()].eq(1).all() and leaf.grad.sum() == 77 * 128
    with pytest.raises(InputError, match=r"jobs\[80\].index"):
        gather_many([*jobs[:80], (x[0], heads, 0)])


@pytest.mark.gpu
def test_index_on_the_gpu_is_checked_once():
    x = torch.randn(40, 64, device="cuda")
    index = torch.randperm(64, device="cuda")[:20]
    assert torch.equal(gather_columns(x, Index(index, 64)), x[:, index])
    with pytest.raises(IndexError, match=r"index\[1\] = 64: out of range"):
        Index(torch.tensor([0, 64], device="cuda"), 64)
    with pytest.raises(InputError, match="wrap it in ppf.fast.ops.index.Index"):
        gather_columns(x, index)


@pytest.mark.gpu
def test_cuda_graph_replays():
    x, index = torch.randn(128, 256, device="cuda"), Index(torch.randperm(256)[:100], 256)
    gather_columns(x, index)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gather_columns(x, index)
    x.normal_()
    graph.replay()
    assert torch.equal(out, gather_columns_reference(x, index.host))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [0, 1])
def test_more_than_two_to_the_31_elements(dim):
    x = torch.empty(262_150, 8200, dtype=torch.bfloat16, device="cuda").normal_()
    assert x.numel() > 2**31
    index = torch.randperm(x.shape[dim])[: x.shape[dim] // 2]
    op, reference = OPS[dim]
    assert torch.equal(op(x, index), reference(x, index))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("value", [-1, 10, 2**31 - 1, 2**40])
def test_out_of_range_is_refused(value, dim, device):
    x, index = torch.zeros(10, 10, device=device), torch.tensor([0, 3, value])
    message = rf"index\[2\] = {value}: out of range for a dimension of size 10. Use values from 0 to 9"
    with pytest.raises(IndexError, match=message):
        OPS[dim][0](x, index)
    with pytest.raises(IndexError, match=message):
        Index(index, 10)
    with pytest.raises(IndexError, match=r"jobs\[1\].index\[2\]"):
        gather_many([(x, torch.tensor([0]), dim), (x, index, dim)])


def test_nothing_is_written_when_an_index_is_bad():
    x, out, index = torch.ones(4, 8), torch.zeros(3, 8), torch.tensor([0, 1, 4])
    fields = gather._fields(x, out, index.data_ptr(), 8, 3, 0, 1)
    with pytest.raises(IndexError):
        _C.gather_cpu(fields, "index", 2)
    assert not out.any()


BAD = {
    "x dtype": (torch.zeros(3, 3, dtype=torch.float64), torch.tensor([0]), "x = torch.float64"),
    "x rank": (torch.zeros(3), torch.tensor([0]), "1 dimensions, 2 expected"),
    "x type": ([[0.0]], torch.tensor([0]), "x = list"),
    "x complex": (torch.zeros(3, 3, dtype=torch.complex64), torch.tensor([0]), "x = torch.complex64"),
    "index dtype": (torch.zeros(3, 3), torch.tensor([True, False, True]), "index = torch.bool"),
    "index rank": (torch.zeros(3, 3), torch.tensor([[0]]), "2 dimensions, 1 expected"),
    "index type": (torch.zeros(3, 3), [0], "index = list"),
    "index limit": (torch.zeros(3, 3), Index(torch.tensor([0]), 7), "was checked against 7"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("dim", [0, 1])
def test_bad_arguments_name_what_is_wrong(dim, case):
    x, index, message = BAD[case]
    with pytest.raises(InputError, match=message):
        OPS[dim][0](x, index)


def test_bad_dim_names_the_job():
    with pytest.raises(InputError, match=r"jobs\[1\].dim = 2"):
        gather_many([(torch.zeros(2, 2), torch.tensor([0]), 0), (torch.zeros(2, 2), torch.tensor([0]), 2)])


def test_units_of_an_index():
    assert Index(torch.arange(128) + 256, 512).unit == 8
    assert Index(torch.arange(12), 512).unit == 4
    assert Index(torch.tensor([6, 7, 2, 3]), 8).unit == 2
    assert Index(torch.arange(8) + 1, 512).unit == 1
    assert Index(torch.tensor([3, 1, 2]), 8).unit == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [0, 1])
def test_gradient_is_the_scatter_add(dim, device):
    x = torch.randn(9, 12, device=device)
    index = torch.randint(0, x.shape[dim], (15,))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    op, reference = OPS[dim]
    seed = torch.randn_like(reference(x, index))
    op(ours, index).backward(seed)
    reference(theirs, index).backward(seed)
    torch.testing.assert_close(ours.grad, theirs.grad)
    many = x.clone().requires_grad_()
    gather_many([(many, index, dim)])[0].backward(seed)
    torch.testing.assert_close(many.grad, theirs.grad)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, index = torch.randn(10, 16, device=device, requires_grad=True), torch.tensor([3, 3, 9, 0])
    torch.library.opcheck(torch.ops.ppf.gather_rows.default, (x, index))
    torch.library.opcheck(torch.ops.ppf.gather_columns.default, (x, index))
    torch.library.opcheck(torch.ops.ppf.gather_many.default, ([x, x], [index, index], [0, 1], [1, 1]))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_graph_breaks(device):
    x, index = torch.randn(32, 48, device=device), torch.tensor([5, 1, 30])
    kept = Index(torch.tensor([7, 7, 2]), 48)
    kept.on(x.device)

    def shrink(x: Tensor, index: Tensor) -> list[Tensor]:
        return [gather_rows(x * 2, index), gather_columns(x, kept), *gather_many([(x, index, 0), (x + 1, index, 1)])]

    backend = "aot_eager" if device == "cpu" else "inductor"
    compiled = torch.compile(shrink, fullgraph=True, backend=backend)
    for found, expected in zip(compiled(x, index), shrink(x, index), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
def test_devices_without_kernels_fall_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(gather._C, "cuda_problem", lambda device: "no kernel image")
    gather._cuda_ready.cache_clear()
    x, index = torch.randn(6, 6, device="cuda"), torch.tensor([5, 0])
    with pytest.warns(RuntimeWarning, match="no kernel image"):
        assert torch.equal(gather_rows(x, index), gather_rows_reference(x, index))
    assert torch.equal(gather_columns(x, index), gather_columns_reference(x, index))
    gather._cuda_ready.cache_clear()
