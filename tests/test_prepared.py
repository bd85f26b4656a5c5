"""A prepared MLP computes what masked_swiglu computes under the selection, from weights of its own."""

import pytest
import torch
from masked_cases import DEVICE, selections, within_twice
from test_masked_swiglu import CHANNELS, operands, shrunk

from ppf.errors import InputError
from ppf.fast.ops.masked_swiglu import masked_swiglu
from ppf.fast.ops.prepared import prepare_swiglu
from ppf.fast.ops.selection import Selection

KINDS = ["prefix", "empty", "full", "sorted", "shuffled", "repeated", "blocks"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
@pytest.mark.parametrize("tokens", [1, 130])
def test_every_selection(tokens, kind, transposed):
    x, gate, up, down = operands(tokens, torch.bfloat16)
    selection = selections(CHANNELS)[kind]
    stored = down.t().contiguous() if transposed else down
    prepared = prepare_swiglu(gate, up, stored, selection, down_transposed=transposed)
    assert prepared.gate.shape[0] == selection.width
    assert within_twice(prepared(x), *shrunk(x, gate, up, down, selection))


def test_a_list_is_copied_and_a_prefix_is_not():
    x, gate, up, down = operands(3, torch.float32)
    listed = prepare_swiglu(gate, up, down, Selection.indices([5, 1, 9], CHANNELS))
    prefix = prepare_swiglu(gate, up, down, Selection.prefix(3, CHANNELS))
    before = listed(x)
    gate.zero_()
    assert torch.equal(listed(x), before) and not prefix(x).any()


def test_gradients_reach_the_weights():
    x, gate, up, down = (t.requires_grad_() for t in operands(5, torch.float32))
    selection = Selection.indices(torch.randperm(CHANNELS)[:50], CHANNELS)
    prepare_swiglu(gate, up, down, selection)(x).sum().backward()
    got = [t.grad.clone() for t in (x, gate, up, down)]
    for t in (x, gate, up, down):
        t.grad = None
    masked_swiglu(x, gate, up, down, selection).sum().backward()
    for a, t in zip(got, (x, gate, up, down), strict=True):
        torch.testing.assert_close(a, t.grad)


@pytest.mark.parametrize("field", ["up", "down", "selection"])
def test_bad_operands_are_named(field):
    _, gate, up, down = operands(1, torch.float32, DEVICE)
    given = {"up": up, "down": down, "selection": Selection.full(CHANNELS)}
    given[field] = Selection.full(9) if field == "selection" else given[field][1:]
    with pytest.raises(InputError) as caught:
        prepare_swiglu(gate, **given)
    assert caught.value.field == field
