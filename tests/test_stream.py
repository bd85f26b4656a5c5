"""Layers that stream are the layers that are resident, whatever they are read from and in whatever order."""

import threading
from pathlib import Path

import pytest
import torch
from factories import dense_weights, llama, llama_config, random_ranking, tokens

from ppf.checkpoint import Checkpoint, load_decoder, save
from ppf.errors import InputError
from ppf.families import KINDS
from ppf.fast.permute import permuted
from ppf.fitting.calibration import calibrate
from ppf.fitting.evaluation import Evaluator
from ppf.model.grid import Grid
from ppf.model.stream import Host, Packing, Placement, Staged, Stream

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(llama(llama_config()), None, tmp_path / "model", {})
    return tmp_path / "model"


def layers(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"a": torch.randn(3, 5 + index, generator=generator), "b": torch.arange(7 * index, dtype=torch.int64)}
        for index in range(count)
    ]


def same(a, b) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_packed_layers_are_the_same_bits():
    layer = layers()[2] | {"c": torch.randn(2, 3).to(torch.bfloat16), "empty": torch.empty(0, 4)}
    packing = Packing.of(layer)
    block = torch.full((packing.nbytes,), 255, dtype=torch.uint8)
    packing.pack(layer, block)
    assert same(packing.views(block), layer)
    assert all(tensor.data_ptr() % 16 == block.data_ptr() % 16 for tensor in packing.views(block).values())


@pytest.mark.parametrize("source", ["host", "staged"])
def test_any_order_gives_the_right_layer(source):
    known = layers()
    made = Host(iter(known), False) if source == "host" else Staged(4, known.__getitem__, False)
    stream = Stream(made, CPU)
    for index in (0, 1, 2, 3, 0, 1, 3, 3, 2, 0):
        assert same(stream[index], known[index])
    assert all(same(a, b) for a, b in zip(stream, known, strict=True)) and len(stream) == 4
    doubled = stream.map(lambda index, layer: {"a": 2 * layer["a"] + index})
    assert torch.equal(doubled[3]["a"], 2 * known[3]["a"] + 3)
    with pytest.raises(IndexError):
        stream[4]
    stream.close()
    assert same(stream[1], known[1])


def test_two_streams_of_one_source_do_not_meet():
    """One of a base and a mapped stream reads while the other does: each through blocks of its own."""
    generator = torch.Generator().manual_seed(1)
    known = [{"a": torch.randn(400, 500 + index, generator=generator)} for index in range(6)]
    base = Stream(Staged(6, known.__getitem__, False), CPU)
    other = base.map(lambda index, layer: dict(layer))
    for _ in range(20):
        for index in range(6):
            assert torch.equal(base[index]["a"], known[index]["a"])
            assert torch.equal(other[(index + 3) % 6]["a"], known[(index + 3) % 6]["a"])


def test_what_was_handed_out_stays_what_it_was():
    known = layers()
    stream = Stream(Staged(4, known.__getitem__, False), CPU)
    held = list(stream)
    assert all(same(a, b) for a, b in zip(held, known, strict=True))


def test_the_next_layer_is_read_ahead_and_only_that():
    read, ahead = [], threading.Event()

    def reading(index: int):
        read.append(index)
        if index == 1:
            ahead.set()
        return layers()[index]

    stream = Stream(Staged(4, reading, False), CPU)
    stream[0]
    assert ahead.wait(5) and read == [0, 1]
    stream[0], stream[1], stream[2], stream[3]
    stream.close()
    assert read == [0, 1, 2, 3, 0]  # after the last comes the first: the next wave's


def test_a_layer_that_cannot_be_read_says_so():
    def damaged(index: int):
        raise InputError("weights", "file", "holds NaN", "Get it again")

    with pytest.raises(InputError, match="holds NaN"):
        Stream(Staged(2, damaged, False), CPU)[0]


@pytest.mark.parametrize("place", ["host", "disk"])
def test_streamed_models_calibrate_and_evaluate_alike(folder, place):
    resident, streamed = load_decoder(folder), load_decoder(folder, placement=Placement(place))
    assert resident.resident and not streamed.resident
    sequences = tokens(4, 24)
    for a, b in zip(calibrate(resident, sequences), calibrate(streamed, sequences), strict=True):
        assert all(torch.equal(a.of(kind).gram, b.of(kind).gram) for kind in KINDS)
    grid, ranking = Grid(resident.structure, 8), random_ranking(resident.structure)
    policies = grid.decode(torch.stack([torch.tensor(grid.maximum), torch.tensor(grid.minimum) + 1]))
    ours, theirs = (Evaluator(permuted(d, ranking), grid, sequences) for d in (streamed, resident))
    assert ours.log_perplexities(policies) == theirs.log_perplexities(policies)
    assert torch.equal(ours.logits(policies[1], sequences), theirs.logits(policies[1], sequences))


def test_bad_placements_are_refused(folder):
    with pytest.raises(InputError, match="weights = moon: is not a place"):
        Placement("moon")
    with pytest.raises(InputError, match="gpu-memory-gb"):
        Placement("auto", 10)
    with pytest.raises(InputError, match="taylor"):
        load_decoder(folder, placement=Placement("host")).require_resident("--ranking taylor")


def test_on_a_cpu_weights_are_where_they_are_mapped(folder):
    assert load_decoder(folder, placement=Placement()).resident
    _, decoder = dense_weights()
    assert decoder.resident and Checkpoint(folder).decoder("cpu").resident


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["host", "disk"])
def test_streams_to_a_gpu(folder, place):
    resident, streamed = (load_decoder(folder, "cuda", placement=Placement(p)) for p in ("gpu", place))
    for _ in range(3):
        assert all(same(a, b) for a, b in zip(streamed.layers, resident.layers, strict=True))
    assert next(iter(streamed.layers))["mlp.up_proj.weight"].is_cuda
