"""Results written tensor by tensor are those written from memory, and no more than a file of them is ever held."""

from __future__ import annotations

import errno
import json
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import byte_tokenizer, config_of, llama, llama_config, tokens
from refit_cases import library_of
from safetensors.torch import load_file
from test_towers import OTHER, UNIFORM, cut, gemma, ids, mistral
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from ppf.checkpoint import Checkpoint, load, load_decoder, save, save_stream, verify
from ppf.checkpoint.headers import INDEX, WEIGHTS
from ppf.checkpoint.shards import planned, write_shards
from ppf.errors import InputError, PPFError
from ppf.families import families
from ppf.fast.permute import identity
from ppf.fitting.materialize import materialize, pruned_tensors
from ppf.model.build import pruned_config
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy
from ppf.model.stream import Placement

pytestmark = pytest.mark.usefixtures("one_thread")
DIFFERENT, ALIKE = Policy([3, 0, 3, 3], [64, 16, 0, 40]), Policy([3] * 4, [40] * 4)
PLACES = pytest.mark.parametrize("place", ["host", "disk"])


@pytest.fixture
def dense(tmp_path) -> Path:
    save(llama(llama_config()), None, tmp_path / "dense", {})
    return tmp_path / "dense"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stream(decoder: Decoder, policy: Policy, path: Path, library=None, **options) -> None:
    """The pruned model written as it comes; its units stay in the order that they have."""
    grid = Grid(decoder.structure, 8)
    config, found = (
        pruned_config(decoder.config, policy),
        pruned_tensors(decoder, identity(decoder), grid, policy, library),
    )
    save_stream(config, found, decoder.dtype, path, lambda _: {}, **options)


def in_memory(decoder: Decoder, policy: Policy, library=None):
    return materialize(decoder, identity(decoder), Grid(decoder.structure, 8), policy, library)


@pytest.mark.parametrize(
    ("limit", "files"),
    [(100, [4]), (36, [4]), (35, [3, 1]), (16, [2, 1, 1]), (9, [1, 1, 1, 1])],
)
def test_files_are_filled_in_order(limit, files):
    sizes = {"a": 10, "b": 6, "c": 16, "d": 4}
    layout = planned(sizes, limit)
    assert list(layout) == list(sizes)
    names = list(dict.fromkeys(layout.values()))
    assert [list(layout.values()).count(name) for name in names] == files
    count = len(files)
    assert names == (
        [WEIGHTS] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    )


class Watched:
    """Tensors made one by one, of which it knows how many bytes are alive."""

    def __init__(self, sizes: dict[str, int]):
        self.sizes, self.made, self.most = sizes, [], 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, size in self.sizes.items():
            array = np.full(size, len(self.made), dtype=np.uint8)
            self.made.append(weakref.ref(array))
            tensor = torch.from_numpy(array)  # its storage keeps the array
            del array
            self.most = max(self.most, self.alive())
            yield name, tensor
            del tensor

    def alive(self) -> int:
        return sum(array.nbytes for made in self.made if (array := made()) is not None)


def test_one_file_and_the_tensor_at_hand_are_held(tmp_path):
    watched = Watched({f"tensor {index}": 1000 + index for index in range(40)})
    write_shards(tmp_path, watched.sizes, watched, limit=5200)
    assert 4000 < watched.most <= 5200 + 1040 and watched.alive() == 0
    held = Watched(watched.sizes)
    kept = list(held)
    assert len(kept) == 40 and held.most > 5200 + 1040  # negative control
    state = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in kept) and len(state) == 40
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(watched.sizes.values()) and set(index["weight_map"]) == set(state)
    assert max(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 5200 + 1000


def test_parts_of_something_larger_do_not_keep_it(tmp_path):
    large = np.zeros(1 << 20, dtype=np.float32)
    alive, seen = weakref.ref(large), []

    def parts() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal large
        whole = torch.from_numpy(large)
        large = None
        yield "rows", whole[4:8]
        del whole
        seen.append(alive() is None)
        yield "last", torch.ones(3)

    write_shards(tmp_path, {"rows": 16, "last": 12}, parts())
    assert seen == [True] and set(load_file(tmp_path / WEIGHTS)) == {"rows", "last"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": 4, "b": 8}, "tensor c was to be written"),
        ({"a": 4, "b": 9, "c": 2}, "tensor b of 9 bytes is not"),
        ({"a": 4, "d": 8}, "tensor d of 8 bytes is not"),
    ],
)
def test_what_was_not_planned_is_an_error(tmp_path, given, message):
    with pytest.raises(PPFError, match=message):
        write_shards(tmp_path, {"a": 4, "b": 8, "c": 2}, Watched(given))
    with pytest.raises(PPFError, match="tensor a of 4 bytes is not"):
        write_shards(tmp_path, {"a": 4, "b": 8}, [*Watched({"a": 4}), *Watched({"a": 4, "b": 8})])


@pytest.mark.parametrize("policy", [DIFFERENT, ALIKE], ids=["layers differ", "uniform"])
@pytest.mark.parametrize("family", [family.model_type for family in families()])
def test_every_familys_files_are_those_of_a_model_in_memory(family, policy, tmp_path):
    decoder = Decoder.of_model(llama(config_of(family)))
    save(in_memory(decoder, policy), byte_tokenizer(), tmp_path / "memory", {})
    stream(decoder, policy, tmp_path / "stream", tokenizer=byte_tokenizer())
    assert contents(tmp_path / "stream") == contents(tmp_path / "memory")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_dtypes_tied_heads_refits_and_generation_settings(dtype, tied, tmp_path):
    decoder = Decoder.of_model(llama(llama_config(tie_word_embeddings=tied), dtype=dtype))
    library = library_of(decoder, identity(decoder), Grid(decoder.structure, 8), tokens(8, 40))
    model = in_memory(decoder, DIFFERENT, library)
    model.generation_config.max_new_tokens = 17
    save(model, None, tmp_path / "memory", {})
    stream(decoder, DIFFERENT, tmp_path / "stream", library, generation=model.generation_config)
    assert contents(tmp_path / "stream") == contents(tmp_path / "memory")


@PLACES
def test_streamed_layers_give_the_same_files(dense, place, tmp_path):
    stream(load_decoder(dense), DIFFERENT, tmp_path / "resident")
    stream(load_decoder(dense, placement=Placement(place)), DIFFERENT, tmp_path / "streamed")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "resident") and verify(tmp_path / "streamed")


@PLACES
def test_one_layer_is_held_at_a_time(dense, place):
    alive: list[weakref.ref] = []

    def watched(_, layer):
        found = {}
        for name, tensor in layer.items():
            array = tensor.numpy().copy()
            alive.append(weakref.ref(array))
            found[name] = torch.from_numpy(array)
        return found

    decoder = load_decoder(dense, placement=Placement(place)).changed(watched)
    grid, most = Grid(decoder.structure, 8), 0
    for _ in pruned_tensors(decoder, identity(decoder), grid, DIFFERENT):
        most = max(most, sum(array() is not None for array in alive))
    assert most <= len(alive) // 4 and len(alive) >= 4 * 9


def test_shards_are_loaded_by_everybody(dense, tmp_path):
    out, expected = tmp_path / "out", in_memory(load_decoder(dense), DIFFERENT)
    stream(load_decoder(dense, placement=Placement("disk")), DIFFERENT, out, shard_bytes=30_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3 and [file.name[6:11] for file in files] == [f"{n + 1:05d}" for n in range(len(files))]
    assert max(file.stat().st_size for file in files) < 60_000 and verify(out)
    for model in (load(out), AutoModelForCausalLM.from_pretrained(out)):
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
        )
        assert torch.equal(model(tokens(2, 9)).logits, expected(tokens(2, 9)).logits)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")]
)
@pytest.mark.parametrize("when", ["writing", "measuring"])
def test_what_fails_in_the_middle_leaves_nothing(dense, tmp_path, failure, existing, when):
    out, decoder, written = tmp_path / "new" / "out", load_decoder(dense), []
    shutil.rmtree(dense)
    if existing:
        out.mkdir(parents=True)
        (out / "precious").write_text("x")

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        whole = list(pruned_tensors(decoder, identity(decoder), Grid(decoder.structure, 8), DIFFERENT))
        yield from whole[: len(whole) // 2 if when == "writing" else None]
        if when == "writing":
            written.extend(tmp_path.rglob("*.safetensors"))
            raise failure

    def report(folder: Path) -> dict:
        written.extend(folder.glob("*.safetensors"))
        raise failure

    config = pruned_config(decoder.config, DIFFERENT)
    with pytest.raises(InputError if isinstance(failure, OSError) else type(failure)):
        save_stream(config, broken(), decoder.dtype, out, report, force=True, shard_bytes=30_000)
    assert written  # it was under way
    left = [str(file.relative_to(tmp_path)) for file in sorted(tmp_path.rglob("*"))]
    assert left == (["new", "new/out", "new/out/precious"] if existing else [])


def test_the_report_sees_what_was_written_and_is_returned(dense, tmp_path):
    decoder, seen = load_decoder(dense), []

    def report(folder: Path) -> dict:
        seen.append((folder, load(folder)(tokens(2, 9)).logits))
        return {"measured": 5}

    found = pruned_tensors(decoder, identity(decoder), Grid(decoder.structure, 8), ALIKE)
    config = pruned_config(decoder.config, ALIKE)
    assert save_stream(config, found, decoder.dtype, tmp_path / "out", report) == {"measured": 5}
    assert json.loads((tmp_path / "out" / "ppf.json").read_text())["measured"] == 5 and verify(tmp_path / "out")
    assert not seen[0][0].exists() and torch.equal(seen[0][1], load(tmp_path / "out")(tokens(2, 9)).logits)


@pytest.mark.parametrize("policy", [UNIFORM, OTHER], ids=["uniform", "layers differ"])
@pytest.mark.parametrize("write", [gemma, mistral])
def test_multimodal_models_are_written_as_they_come(write, policy, tmp_path):
    write(tmp_path / "in")
    source, tower = Checkpoint(tmp_path / "in"), cut(load(tmp_path / "in"), policy)
    save(tower, None, tmp_path / "memory", {}, source=source)
    decoder = load_decoder(tmp_path / "in", placement=Placement("disk"))
    stream(decoder, policy, tmp_path / "stream", source=source, generation=tower.generation_config)
    assert contents(tmp_path / "stream") == contents(tmp_path / "memory")
    stream(decoder, policy, tmp_path / "shards", source=source, shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "shards")
    assert torch.equal(model(input_ids=ids()).logits, tower(ids()).logits)
