"""An opened checkpoint: the one place through which weights are read."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..errors import InputError
from ..families import Family
from ..model.build import LAYERS, TIED
from ..model.decoder import Decoder
from ..model.stream import Placement
from .checks import check_contents
from .headers import StoredTensor
from .placing import layers_of
from .sources import local_folder
from .weights import finite, read_tensors
from .wrapper import Wrapper

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """A folder that passed :func:`ppf.checkpoint.check_checkpoint`; of a multimodal model, its text tower.

    ``config`` and the names in ``stored`` are those of a text-only model, whatever the folder calls them.
    ``passengers`` are the other tensors of a multimodal model by their names on disk, ``wrapper`` says what it is (None
    for a language model). ``notes`` say what was not taken as the files say. Weights are read when asked for, one at a
    time, and checked: NaN and Inf raise ``InputError`` naming file and tensor, as does float16 that overflows.
    """

    def __init__(self, path: str | Path):
        self.folder = local_folder(path)
        contents = check_contents(self.folder)
        self.config: PreTrainedConfig = contents.config
        self.family: Family = contents.family
        self.stored: dict[str, StoredTensor] = contents.stored
        self.passengers: dict[str, StoredTensor] = contents.passengers
        self.wrapper: Wrapper | None = contents.wrapper
        self.notes: tuple[str, ...] = contents.notes
        self._layers: dict[int, list[str]] = defaultdict(list)
        for name in self.stored:
            if name.startswith(LAYERS):
                self._layers[int(name.removeprefix(LAYERS).split(".", 1)[0])].append(name)

    def tensor(self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """One weight by its name in a text-only model, in its stored dtype if none is given."""
        return self._read([name], device, dtype)[name]

    def layer(self, index: int, device: str | torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The weights of a layer by their names inside it, such as ``mlp.down_proj.weight``; empty if it has none."""
        prefix = f"{LAYERS}{index}."
        read = self._read(self._layers.get(index, ()), device, dtype)
        return {name.removeprefix(prefix): tensor for name, tensor in read.items()}

    def outer(self, device: str | torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The weights outside the layers by their full names; a tied head is not among them."""
        return self._read([name for name in self.stored if not name.startswith(LAYERS)], device, dtype)

    def state(self, device: str | torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """All weights by their names in a text-only model."""
        return self._read(self.stored, device, dtype)

    def decoder(
        self, device: str | torch.device, dtype: str | torch.dtype = "auto", placement: Placement | None = None
    ) -> Decoder:
        """The model as plain tensors, its layers where ``placement`` wants them. Raises ``InputError`` for an unknown
        dtype."""
        wanted, target = self.resolve_dtype(dtype), torch.device(device)
        config = copy.deepcopy(self.config)
        config.dtype = wanted
        layers, outer = layers_of(self, target, wanted, placement), self.outer(target, wanted)
        return Decoder.of_layers(config, layers, outer)

    def resolve_dtype(self, dtype: str | torch.dtype = "auto") -> torch.dtype:
        """``dtype`` by name or itself; "auto" is the config's, else the embedding's. Raises ``InputError``."""
        if dtype == "auto":
            stored = _STORED_DTYPES[self.stored[TIED[1]].dtype]
            return self.config.dtype if self.config.dtype in DTYPES.values() else stored
        resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        if resolved not in DTYPES.values():
            raise InputError("dtype", dtype, "is not supported", f"Use auto or one of {list(DTYPES)}")
        return resolved

    def _read(self, names: Iterable[str], device: str | torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
        read = read_tensors({name: self.stored[name] for name in names}, device)
        return {name: finite(self.stored[name].file, name, tensor, dtype) for name, tensor in read}
