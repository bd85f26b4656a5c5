"""The grid: levels and widths, costs, and every refusal."""

import pytest
import torch
from factories import llama_config

from ppf.errors import InputError
from ppf.model import pruned_config
from ppf.model.grid import Grid
from ppf.model.layout import expected_tensors
from ppf.model.policy import Policy
from ppf.model.structure import Structure

CONFIG = llama_config("gqa")
GRID = Grid(Structure.from_config(CONFIG), 16)


def random_grid_levels(grid: Grid, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(grid.minimum), torch.tensor(grid.maximum)
    return low + (torch.rand((count, grid.sublayers), generator=generator) * (high - low + 1)).long()


def test_geometry():
    assert GRID.sublayers == 8 and GRID.levels == 5
    assert GRID.maximum == (3, 3, 3, 3, 4, 4, 4, 4) and GRID.minimum == (1, 0, 0, 0, 0, 0, 0, 0)
    assert GRID.dense() == Policy([3] * 4, [64] * 4) and GRID.ratio(GRID.dense()) == 0


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_encode_and_decode_are_inverse(multiple):
    grid = Grid(GRID.structure, multiple)
    levels = random_grid_levels(grid, 100)
    policies = grid.decode(levels)
    assert torch.equal(grid.encode(policies), levels)
    assert grid.encode([]).shape == (0, 8) and grid.decode(levels[:0]) == []
    assert {width % multiple for policy in policies for width in policy.ffn} == {0}


def test_kept_counts_the_parameters_of_the_pruned_model():
    levels = random_grid_levels(GRID, 20)
    for policy, kept in zip(GRID.decode(levels), GRID.kept(levels).tolist(), strict=True):
        shapes = expected_tensors(pruned_config(CONFIG, policy))
        assert kept == sum(shape.numel() for name, shape in shapes.items() if "_proj." in name)
        assert GRID.ratio(policy) == 1 - kept / GRID.structure.decoder_parameters


def test_maximum_ratio_is_that_of_the_smallest_policy():
    smallest = Policy([1, 0, 0, 0], [0] * 4)
    assert GRID.ratio(smallest) == GRID.maximum_ratio
    assert GRID.encode([smallest]).tolist() == [list(GRID.minimum)]


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        (Policy([3] * 3, [64] * 4), "policy.attention"),
        (Policy([3] * 4, [64] * 5), "policy.ffn"),
        (Policy([], []), "policy.attention"),
        (Policy([0, 3, 3, 3], [64] * 4), "policy.attention[0]"),
        (Policy([3, 4, 3, 3], [64] * 4), "policy.attention[1]"),
        (Policy([3, -1, 3, 3], [64] * 4), "policy.attention[1]"),
        (Policy([3] * 4, [64, 64, 63, 64]), "policy.ffn[2]"),
        (Policy([3] * 4, [64, 64, 64, 80]), "policy.ffn[3]"),
        (Policy([3] * 4, [-16, 64, 64, 64]), "policy.ffn[0]"),
    ],
)
def test_policies_off_the_grid_are_refused(policy, field):
    for refuses in (GRID.check, GRID.ratio, lambda p: GRID.encode([GRID.dense(), p])):
        with pytest.raises(InputError) as caught:
            refuses(policy)
        assert caught.value.field == field and caught.value.remedy


@pytest.mark.parametrize("multiple", [0, -1, 24, 65, 128])
def test_multiples_that_do_not_fit_are_refused(multiple):
    with pytest.raises(InputError) as caught:
        Grid(GRID.structure, multiple)
    assert caught.value.field == "ffn-multiple" and "[64, 32, 16, 8, 4, 2]" in caught.value.remedy
