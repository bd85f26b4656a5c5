"""The library that is made of factors: what is kept, what is solved again, and what both may stream from."""

from dataclasses import replace

import pytest
import torch
from factories import config_of, dense_weights, llama, random_ranking, tokens
from safetensors.torch import load_file, save_file
from structures import llama_structure

from ppf.errors import InputError
from ppf.families import KINDS
from ppf.fast.permute import permuted
from ppf.fitting.calibration import calibrate
from ppf.fitting.factors import Factors, boundaries_of, factorise_layer, tensors_of, widths_of
from ppf.fitting.library import Library, library_bytes
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid, unrestricted
from ppf.model.policy import Policy
from ppf.model.stream import Host, Stream

pytestmark = pytest.mark.usefixtures("one_thread")


class Case:
    """A model with a random ranking, its grid, and the tensors of all layers' files."""

    def __init__(self, decoder: Decoder, grid: Grid):
        ranking = random_ranking(decoder.structure)
        self.grid, self.decoder = grid, permuted(decoder, ranking)
        self.factors = [
            tensors_of(factorise_layer(self.outputs(index), statistics, ranking[index], grid, index))
            for index, statistics in enumerate(calibrate(decoder, tokens(8, 40)))
        ]

    def outputs(self, index: int) -> dict[str, torch.Tensor]:
        return self.decoder.names(index).outputs(self.decoder.layers[index])

    def library(self, *args, **kwargs) -> Library:
        return Library(self.decoder, self.grid, self.factors, *args, **kwargs)


@pytest.fixture(scope="module")
def case() -> Case:
    decoder = dense_weights("gqa")[1]
    return Case(decoder, Grid(decoder.structure, 16))


def whole(library: Library) -> int:
    """Bytes of all solutions in fp32."""
    grid, layers = library.grid, library.grid.structure.layers
    columns = sum(sum(widths_of(grid, kind, index)) for kind in KINDS for index in range(layers))
    return 4 * grid.structure.hidden * columns


def test_everything_is_kept_if_everything_fits_else_nothing(case):
    size = whole(case.library())
    roomy, tight = case.library(cache_bytes=size), case.library(cache_bytes=size - 1)
    assert roomy.weight(5, 2) is roomy.weight(5, 2) and dict(roomy.descending(5, [2]))[2] is roomy.weight(5, 2)
    first = tight.weight(5, 2)
    assert tight.weight(5, 2) is not first and torch.equal(tight.weight(5, 2), first)
    assert not tight._cache and torch.equal(roomy.weight(5, 2), first)
    # In half the bytes everything fits again.
    halves = tight.to(torch.bfloat16)
    assert halves.weight(5, 2) is halves.weight(5, 2) and torch.equal(halves.weight(5, 2), first.bfloat16())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_solutions_are_the_same_together_and_alone(case, dtype):
    """Bit for bit, or a checkpoint would not be what was evaluated."""
    roomy, tight = case.library(dtype), case.library(dtype, cache_bytes=1)
    for sublayer, top in enumerate(case.grid.maximum):
        stacked = roomy.levels(sublayer)
        descending = [list(library.descending(sublayer, range(top + 1))) for library in (roomy, tight)]
        for level in range(top + 1):
            alone = tight.weight(sublayer, level)
            width = widths_of(case.grid, KINDS[sublayer // 4], sublayer % 4)[level]
            assert alone.dtype == (dtype or torch.float32) and alone.shape == (48, width)
            assert torch.equal(roomy.weight(sublayer, level), alone)
            for found in descending:
                assert found[top - level][0] == level and torch.equal(found[top - level][1], alone)
            assert torch.equal(stacked[level, :, :width], alone) and not stacked[level, :, width:].any()


def test_the_full_width_is_the_decoders_own(case):
    for library in (case.library(), case.library(cache_bytes=1)):
        assert library.weight(6, 4) is case.decoder.output(2, "ffn")
        assert library.to(torch.float32) is library
        sixteen = library.to(torch.bfloat16)
        assert sixteen.to(torch.bfloat16) is sixteen
        assert torch.equal(sixteen.weight(6, 4), case.decoder.output(2, "ffn").bfloat16())


@pytest.mark.parametrize("cache", [None, 1])
def test_weights_and_factors_may_stream(case, cache):
    """Layer by layer, twice around; errors come from beside the stream."""
    device = torch.device("cpu")
    layers, factors = (Stream(Host(iter(held), False), device) for held in (case.decoder.layers, case.factors))
    decoder = replace(case.decoder, layers=layers)
    library = Library(decoder, case.grid, factors, cache_bytes=cache, errors=case.factors)
    expected = case.library()
    for _ in range(2):
        for index in range(4):
            for sublayer in (index, 4 + index):
                for level, weight in library.descending(sublayer, range(1, case.grid.maximum[sublayer] + 1)):
                    assert torch.equal(weight, expected.weight(sublayer, level))
                assert torch.equal(library.error(sublayer), expected.error(sublayer))
    layers.close()
    factors.close()


def test_a_library_serves_every_grid_of_its_boundaries(case):
    coarse = Library(case.decoder, Grid(case.grid.structure, 32), case.factors)
    fine = case.library()
    assert torch.equal(coarse.weight(5, 1), fine.weight(5, 2)) and len(coarse.error(5)) == 3
    assert torch.equal(coarse.error(5), fine.error(5)[::2]) and torch.equal(coarse.error(1), fine.error(1))
    for multiple in (8, 1):
        with pytest.raises(InputError, match="ffn-multiple.*only multiples of 16 for the ffn of layer 0"):
            Library(case.decoder, Grid(case.grid.structure, multiple), case.factors)


def test_portable_libraries_hold_the_widths_that_their_price_needs():
    structure = llama_structure(2, 48, 3, 2, 8, 1024)
    portable, ordinary = Grid(structure, 256, portable=True), Grid(structure, 256)
    assert unrestricted(portable) == Grid(structure, 64) and unrestricted(ordinary) is ordinary
    assert boundaries_of(portable, "ffn", 1) == list(range(0, 1025, 64))
    assert boundaries_of(ordinary, "ffn", 1) == list(range(0, 1025, 256))
    assert boundaries_of(portable, "attention", 0) == [0, 16, 32, 48]
    odd = Grid(llama_structure(2, 48, 3, 2, 8, 384), 192, portable=True)
    assert unrestricted(odd).ffn_multiple == 64


def test_a_factor_that_is_not_there_is_named(case):
    for name in ("error", "boundaries"):
        layers = [dict(layer) for layer in case.factors]
        del layers[1][f"attention.{name}"]
        with pytest.raises(KeyError, match=f"attention.{name}"):
            Library(case.decoder, case.grid, layers)


def test_sublayers_that_the_model_lacks_have_no_refits():
    """Only what is there is refitted; levels count from the source's own widths."""
    policy = Policy([3, 0, 2, 0], [64, 16, 0, 0])
    decoder = Decoder.of_model(llama(pruned_config(config_of("qwen2"), policy)))
    case = Case(decoder, Grid(decoder.structure, 16))
    for index, tensors in enumerate(case.factors):
        assert {name.split(".")[0] for name in tensors} == {kind for kind in KINDS if policy[kind][index]}
    library = case.library()
    assert [len(library.error(s)) for s in range(8)] == [level + 1 for level in case.grid.maximum]
    assert library.error(1).tolist() == library.error(6).tolist() == [0.0]
    assert library.weight(2, 1).shape == (48, 16) and library.weight(5, 1).shape == (48, 16)
    assert library.weight(1, 0).shape == library.weight(2, 0).shape == (48, 0)
    assert library.levels(1).shape == (1, 48, 0)
    assert widths_of(case.grid, "attention", 2) == [0, 16, 32] and widths_of(case.grid, "ffn", 2) == [0]
    assert library_bytes(case.grid) == sum(t.nbytes for layer in case.factors for t in layer.values())


def test_library_bytes_are_those_on_disk(tmp_path, case):
    written = 0
    for tensors in case.factors:
        parts = {kind: Factors(tensors[f"{kind}.regression"], tuple(tensors[f"{kind}.boundaries"].tolist()),
                               tensors[f"{kind}.error"]) for kind in KINDS}  # fmt: skip
        save_file(tensors_of(parts), tmp_path / "layer")
        written += sum(tensor.nbytes for tensor in load_file(tmp_path / "layer").values())
    assert library_bytes(case.grid) == written


def test_large_libraries_take_about_half_a_byte_for_each_byte_of_the_model():
    """Llama-2-7B: a bf16 for each pair of inputs, whatever the number of levels."""
    grid, coarse = (Grid(llama_structure(32, 4096, 32, 1, 128, 11008), multiple) for multiple in (64, 688))
    assert library_bytes(grid) == pytest.approx(32 * (11008 * (11008 - 64) + 4096 * (4096 - 128)), rel=1e-4)
    assert 0.9 * library_bytes(grid) < library_bytes(coarse) < library_bytes(grid)
