"""The grid: levels and widths, costs, and every refusal; of equal layers and of layers that differ."""

import pytest
import torch
from factories import config_of, llama_config

from ppf.errors import InputError
from ppf.families import family_of
from ppf.model.build import expected_tensors, pruned_config
from ppf.model.geometry import structure_of
from ppf.model.grid import Grid, portable_multiple
from ppf.model.policy import Policy

CONFIG = llama_config("gqa")
IRREGULAR = pruned_config(CONFIG, Policy([3, 0, 2, 1], [64, 16, 0, 48]))
WHOLE = config_of("olmo2")  # attention goes as a whole or not at all


def grid_of(config, multiple: int = 16, portable: bool = False) -> Grid:
    return Grid(structure_of(family_of(config.model_type), config), multiple, portable)


GRIDS = {"equal layers": grid_of(CONFIG), "layers that differ": grid_of(IRREGULAR), "whole": grid_of(WHOLE)}
SOURCES = {"equal layers": CONFIG, "layers that differ": IRREGULAR, "whole": WHOLE}
GRID = GRIDS["equal layers"]
every_grid = pytest.mark.parametrize("name", GRIDS)


def random_grid_levels(grid: Grid, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(grid.minimum), torch.tensor(grid.maximum)
    return low + (torch.rand((count, grid.sublayers), generator=generator) * (high - low + 1)).long()


def test_geometry():
    assert GRID.sublayers == 8 and GRID.levels == 5
    assert GRID.maximum == (3, 3, 3, 3, 4, 4, 4, 4) == GRID.top and GRID.minimum == (1, 0, 0, 0, 0, 0, 0, 0)
    assert GRID.dense() == Policy([3] * 4, [64] * 4) and GRID.ratio(GRID.dense()) == 0


def test_geometry_of_layers_that_differ():
    """The source's own widths are the largest; where it has nothing there is one level, and one to divide by."""
    grid = GRIDS["layers that differ"]
    assert grid.maximum == (3, 0, 2, 1, 4, 1, 0, 3) and grid.top == (3, 1, 2, 1, 4, 1, 1, 3)
    assert grid.minimum == (1, 0, 0, 0, 0, 0, 0, 0) and grid.levels == 5
    assert grid.dense() == Policy([3, 0, 2, 1], [64, 16, 0, 48]) and grid.ratio(grid.dense()) == 0
    assert [cost == 0 for cost in grid.step_cost] == [False, True, False, False, False, False, True, False]


def test_geometry_of_attention_that_goes_as_a_whole():
    grid = GRIDS["whole"]
    assert grid.steps == (3, 3, 3, 3, 16, 16, 16, 16) and grid.maximum == (1, 1, 1, 1, 4, 4, 4, 4)
    assert grid.minimum == (1, 0, 0, 0, 0, 0, 0, 0)
    assert grid.decode(torch.tensor([[1, 0, 1, 0, 4, 0, 1, 2]])) == [Policy([3, 0, 3, 0], [64, 0, 16, 32])]


@pytest.mark.parametrize("source", [CONFIG, IRREGULAR])
def test_portable_policies_keep_all_attention_there_is(source):
    grid = grid_of(source, portable=True)
    assert grid.minimum == grid.maximum[:4] + (0,) * 4
    with pytest.raises(InputError, match="off the grid"):
        grid.check(Policy([2, *grid.dense().attention[1:]], grid.dense().ffn))


def test_the_portable_step_divides_the_channels_of_every_layer():
    assert portable_multiple(GRID.structure) == 64
    assert portable_multiple(GRIDS["layers that differ"].structure) == 16
    assert portable_multiple(grid_of(llama_config(intermediate_size=768)).structure) == 256


@every_grid
@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_encode_and_decode_are_inverse(name, multiple):
    grid = Grid(GRIDS[name].structure, multiple)
    levels = random_grid_levels(grid, 100)
    policies = grid.decode(levels)
    assert torch.equal(grid.encode(policies), levels)
    assert grid.encode([]).shape == (0, 8) and grid.decode(levels[:0]) == []
    assert {width % multiple for policy in policies for width in policy.ffn} == {0}
    assert grid.encode([grid.dense()]).tolist() == [list(grid.maximum)]


@every_grid
def test_kept_counts_the_parameters_of_the_pruned_model(name):
    grid, levels = GRIDS[name], random_grid_levels(GRIDS[name], 12)
    for policy, kept in zip(grid.decode(levels), grid.kept(levels).tolist(), strict=True):
        shapes = expected_tensors(pruned_config(SOURCES[name], policy))
        assert kept == sum(shape.numel() for name, shape in shapes.items() if "_proj." in name)
        assert grid.ratio(policy) == 1 - kept / grid.structure.decoder_parameters


@every_grid
def test_maximum_ratio_is_that_of_the_smallest_policy(name):
    grid = GRIDS[name]
    smallest = Policy([grid.steps[0], 0, 0, 0], [0] * 4)
    assert grid.ratio(smallest) == grid.maximum_ratio < 1
    assert grid.encode([smallest]).tolist() == [list(grid.minimum)]


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
        (Policy([3] * 4, [64] * 4, experts=[8] * 4), "policy"),
    ],
)
def test_policies_off_the_grid_are_refused(policy, field):
    for refuses in (GRID.check, GRID.ratio, lambda p: GRID.encode([GRID.dense(), p])):
        with pytest.raises(InputError) as caught:
            refuses(policy)
        assert caught.value.field == field and caught.value.remedy


@pytest.mark.parametrize(
    ("name", "policy", "field"),
    [
        ("layers that differ", Policy([3, 1, 2, 1], [64, 16, 0, 48]), "policy.attention[1]"),
        ("layers that differ", Policy([3, 0, 3, 1], [64, 16, 0, 48]), "policy.attention[2]"),
        ("layers that differ", Policy([3, 0, 2, 1], [64, 16, 16, 48]), "policy.ffn[2]"),
        ("layers that differ", Policy([3, 0, 2, 1], [64, 32, 0, 48]), "policy.ffn[1]"),
        ("whole", Policy([3, 2, 3, 3], [64] * 4), "policy.attention[1]"),
    ],
)
def test_widths_that_the_source_has_not_are_refused(name, policy, field):
    with pytest.raises(InputError, match="off the grid") as caught:
        GRIDS[name].check(policy)
    assert caught.value.field == field


@pytest.mark.parametrize("multiple", [0, -1, 24, 65, 128])
def test_multiples_that_do_not_fit_are_refused(multiple):
    with pytest.raises(InputError) as caught:
        Grid(GRID.structure, multiple)
    assert caught.value.field == "ffn-multiple" and "[64, 32, 16, 8, 4, 2]" in caught.value.remedy


def test_a_multiple_must_divide_the_channels_of_every_layer():
    with pytest.raises(InputError, match="16 FFN channels of layer 1") as caught:
        Grid(GRIDS["layers that differ"].structure, 32)
    assert "[16, 8, 4, 2, 1]" in caught.value.remedy
