"""q, k, v and o of kept kv-groups, multi-head and grouped-query."""

import pytest
import torch
import torch.nn.functional as F
from masked_cases import DEVICE, DTYPES, INTERPRETED, interpreted, on_kernels, within_twice

from ppf.errors import InputError
from ppf.fast.ops.masked_attention import masked_attention_output, masked_attention_projections
from ppf.fast.ops.selection import Selection

HIDDEN, GROUPS = 192, 4
KEPT = {
    "prefix": Selection.prefix(3, 4),
    "list": Selection.indices([3, 1], 4),
    "all": None,
    "none": Selection.prefix(0, 4),
}


def operands(tokens, heads_per_group, head_dim, dtype, device=DEVICE):
    torch.manual_seed(tokens)
    q_rows, kv_rows = GROUPS * heads_per_group * head_dim, GROUPS * head_dim
    x = torch.randn(tokens, HIDDEN, dtype=dtype, device=device)
    weights = [torch.randn(n, HIDDEN, dtype=dtype, device=device) / HIDDEN**0.5 for n in (q_rows, kv_rows, kv_rows)]
    return x, *weights, torch.randn(HIDDEN, q_rows, dtype=dtype, device=device) / q_rows**0.5


def group_rows(selection, size):
    """Rows of the kept groups, counted out by hand."""
    kept = range(GROUPS)[: selection.width] if selection is None or selection.rows(torch.device("cpu")) is None else ()
    kept = list(kept) or ([] if selection is None else selection.rows(torch.device("cpu")).tolist())
    return torch.tensor([g * size + i for g in kept for i in range(size)], dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("head_dim", [64, 48])
@pytest.mark.parametrize("heads_per_group", [1, 3])
@pytest.mark.parametrize("kept", ["prefix", "list", "all"])
@pytest.mark.parametrize("tokens", [1, 16, 50])
def test_projections_of_kept_groups(tokens, kept, heads_per_group, head_dim):
    x, q, k, v, o = operands(tokens, heads_per_group, head_dim, torch.bfloat16)
    selection = KEPT[kept]
    rows = [group_rows(selection or Selection.full(GROUPS), size) for size in (heads_per_group * head_dim, head_dim)]
    parts = masked_attention_projections(x, q, k, v, selection, head_dim)
    for got, weight, index in zip(parts, (q, k, v), (rows[0], rows[1], rows[1]), strict=True):
        assert within_twice(got, F.linear(x, weight[index]), F.linear(x.double(), weight[index].double()))
    inside = parts[0].contiguous()
    for stored, transposed in ((o, False), (o.t().contiguous(), True)):
        y = masked_attention_output(inside, stored, selection, head_dim, GROUPS, o_transposed=transposed)
        shrunk = o[:, rows[0]]
        assert within_twice(y, F.linear(inside, shrunk), F.linear(inside.double(), shrunk.double()))


def test_one_wrong_group_is_noticed():
    x, q, k, v, _ = operands(5, 2, 64, torch.bfloat16)
    got = masked_attention_projections(x, q, k, v, Selection.indices([3, 1], 4), 64)[1]
    wrong = k[group_rows(Selection.indices([3, 2], 4), 64)]
    assert not within_twice(got, F.linear(x, wrong), F.linear(x.double(), wrong.double()))


def test_no_group_gives_nothing_and_zeros():
    x, q, k, v, o = operands(5, 2, 64, torch.bfloat16)
    parts = masked_attention_projections(x, q, k, v, KEPT["none"], 64)
    assert [list(p.shape) for p in parts] == [[5, 0]] * 3
    assert not masked_attention_output(parts[0], o, KEPT["none"], 64, GROUPS).any()


def test_gradients_reach_every_operand():
    x, q, k, v, o = (t.requires_grad_() for t in operands(2, 2, 4, torch.float64, "cpu"))
    selection = KEPT["list"]

    def attention(*operands):
        parts = masked_attention_projections(*operands[:4], selection, 4)
        return (
            masked_attention_output(parts[0], operands[4], selection, 4, GROUPS).sum() + parts[1].sum() + parts[2].sum()
        )

    assert torch.autograd.gradcheck(attention, (x, q, k, v, o), nondet_tol=0.0, fast_mode=True)


def test_opcheck_and_one_graph():
    x, q, k, v, _ = operands(3, 2, 64, torch.float32)
    selection = KEPT["list"]
    q_rows, kv_rows = selection.groups(128), selection.groups(64)
    device = x.device
    arguments = (q_rows.width, q_rows.rows(device), None, kv_rows.width, kv_rows.rows(device), None)
    torch.library.opcheck(torch.ops.ppf.masked_qkv, (x, q, k, v, *arguments))
    compiled = torch.compile(
        lambda a: masked_attention_projections(a, q, k, v, selection, 64), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), masked_attention_projections(x, q, k, v, selection, 64))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 5}, "head_dim"),
        ({"q": torch.ones(18, 8)}, "q"),
        ({"v": torch.ones(16, 8)}, "v"),
        ({"x": torch.ones(2, 9)}, "x"),
        ({"selection": Selection.full(3)}, "selection"),
    ],
)
def test_bad_input_is_named(change, field):
    good = {"x": torch.ones(2, 8), "q": torch.ones(16, 8), "k": torch.ones(8, 8), "v": torch.ones(8, 8)}
    good |= {"selection": Selection.full(2), "head_dim": 4}
    masked_attention_projections(**good)
    with pytest.raises(InputError) as caught:
        masked_attention_projections(**{**good, **change})
    assert caught.value.field == field


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 11])
def test_qkv_kernel(tokens, dtype):
    from ppf.kernels import gemv

    x, q, k, v, _ = operands(tokens, 2, 48, dtype)
    config = {"T": 1 if tokens == 1 else 16, "BN": 16, "BK": 64, "STAGES": 2, "num_warps": 4} if INTERPRETED else None
    for selection in (KEPT["prefix"], KEPT["list"]):
        wide, narrow = selection.groups(96), selection.groups(48)
        index = [wide.rows(x.device), narrow.rows(x.device)]
        parts = gemv.qkv(x, q, k, v, *index, wide.width, narrow.width, config)
        for got, weight, size in zip(parts, (q, k, v), (96, 48, 48), strict=True):
            kept = weight[group_rows(selection, size)]
            assert within_twice(got, F.linear(x, kept), F.linear(x.double(), kept.double()))


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernels run directly here")
def test_kernels_under_the_interpreter():
    interpreted(__file__)
