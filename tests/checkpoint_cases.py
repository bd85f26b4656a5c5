"""What the tests of checkpoints share: the bundled model to damage, and ways to damage it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from factories import TINY
from safetensors.torch import load_file, save_file

from ppf.checkpoint import load
from ppf.checkpoint.hashes import hash_folder
from ppf.checkpoint.report import write_sealed
from ppf.errors import InputError
from ppf.model.build import build, expected_tensors, pruned_config
from ppf.model.policy import Policy

POLICY = Policy([2, 0, 1, 2, 0, 1, 2, 1], [384, 64, 0, 128, 0, 256, 384, 7])
TENSOR = "model.layers.3.mlp.up_proj.weight"


def cut(policy: Policy, folder: Path = TINY):
    """A model cut to the first units of every sub-layer, with its generation config."""
    dense = load(folder)
    config = pruned_config(dense.config, policy)
    state = dense.state_dict()
    kept = {n: state[n][tuple(slice(size) for size in shape)] for n, shape in expected_tensors(config).items()}
    return build(config, {n: t.contiguous() for n, t in kept.items()}, dense.dtype, dense.generation_config)


def tokens() -> torch.Tensor:
    return torch.randint(0, 2048, (2, 40), generator=torch.Generator().manual_seed(0))


def edit_json(file: Path, **changes) -> None:
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def edit_report(folder: Path, **changes) -> None:
    """Change what ``ppf.json`` says, with the checksum that a PPF which wrote it so would have given it."""
    file = folder / "ppf.json"
    edit_json(file, **changes)
    write_sealed(folder, json.loads(file.read_text()))


def as_an_older_ppf(folder: Path, **changes) -> None:
    """Change a result into what PPF wrote before there were checksums, with ``changes`` to its report."""
    for file in folder.glob("*.safetensors"):
        save_file(load_file(file), file, metadata={"format": "pt", "written_by": "ppf"})
    edit_json(folder / "ppf.json", **{"checksum": ..., "headers": ..., "files": hash_folder(folder)} | changes)


def edit_tensors(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_header(folder: Path, change) -> None:
    """Rewrite the header of model.safetensors by ``change(entries)``, leaving the data alone."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    entries = change(entries) or entries
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def refusal(call, *arguments, **options) -> str:
    """The message of the ``InputError`` that ``call`` must raise."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert caught.value.field and caught.value.remedy
    return str(caught.value)


def flip_bit(file: Path, position: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1
    file.write_bytes(raw)
