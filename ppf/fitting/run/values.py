"""What the files of a run may hold. Those with tensors: each function says what is wrong with them, or None.

A checksum says that a file is as it was written; this, that it was written by a fit of this structure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...checkpoint.hashes import sha256_of
from ...errors import InputError
from ...families import KINDS
from ...model.grid import Grid
from ...model.structure import Structure
from ...storage.sealed import Sealed
from ..experience import Evaluation
from ..factors import boundaries_of, packed_size, stored_dtype

_FLOATS = (torch.float32, torch.float64)
_ROUNDING, _SAME = 1e-6, 1e-9


def require_texts(tensors: Mapping[str, Tensor], vocabulary: int, length: int) -> str | None:
    """Token ids int32 [N, ``length`` or less] below ``vocabulary``, and which of them are scored, if not all are."""
    for part in ("calibration", "evaluation"):
        if part not in tensors:
            return f"has no {part}"
        ids, scored = tensors[part], tensors.get(f"{part}.scored")
        if ids.dtype is not torch.int32 or ids.dim() != 2 or not len(ids) or not 2 <= ids.shape[1] <= length:
            return f"{part} is {_shown(ids)}, not int32 sequences of at most {length} tokens"
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            return f"{part} holds token ids outside the vocabulary of {vocabulary}"
        if scored is not None and (scored.dtype is not torch.bool or scored.shape != ids.shape):
            return f"{part}.scored is {_shown(scored)}, not bool {list(ids.shape)}"
    return None


def require_statistics(tensors: Mapping[str, Tensor], structure: Structure, index: int) -> str | None:
    """A permutation of every kind's units, and finite moments of its columns, of layer ``index``."""
    for kind in KINDS:
        sublayer, order = structure.of(kind)[index], tensors.get(f"ranking.{kind}")
        if order is None or order.dtype is not torch.int64 or order.shape != (sublayer.units,):
            return f"ranking.{kind} is {_shown(order)}, not int64 [{sublayer.units}]"
        if not torch.equal(order.sort().values, torch.arange(sublayer.units)):
            return f"ranking.{kind} is not a permutation of {sublayer.units} units"
        for part in ("mean", "variance") if sublayer.units else ():
            name = f"{kind}.{part}"
            if problem := _not_finite(name, tensors.get(name), (sublayer.width,)):
                return problem
            if part == "variance" and tensors[name].min() < 0:
                return f"{name} is negative"
    return None


def require_factors(tensors: Mapping[str, Tensor], grid: Grid, index: int) -> str | None:
    """Finite regressions between the widths of the grid's levels, with shares of the error, of layer ``index``."""
    for kind in KINDS:
        sublayer = grid.structure.of(kind)[index]
        if not sublayer.units:
            continue
        boundaries = boundaries_of(grid, kind, index)
        found = tensors.get(f"{kind}.boundaries")
        if found is None or found.dtype is not torch.int64 or found.tolist() != boundaries:
            return f"{kind}.boundaries are not the widths of the run's grid"
        name, dtype = f"{kind}.regression", stored_dtype(sublayer.width)
        problem = _not_finite(name, tensors.get(name), (packed_size(boundaries),), (dtype,))
        problem = problem or _not_finite(f"{kind}.error", tensors.get(f"{kind}.error"), (len(boundaries),))
        if problem:
            return problem
        error = tensors[f"{kind}.error"]
        if error.min() < 0 or error.max() > 1 + _ROUNDING:
            return f"{kind}.error holds what is not a share"
    return None


def require_state(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.dtype]) -> str | None:
    """Finite numbers under the names and of the types that a network has."""
    if different := sorted(set(tensors) ^ set(expected)):
        return f"{different[0]} is {'missing' if different[0] in expected else 'unknown'}"
    for name, tensor in tensors.items():
        if tensor.dtype is not expected[name]:
            return f"{name} is {_shown(tensor)}, not {_name(expected[name])}"
        if tensor.is_floating_point() and not _finite(tensor):
            return f"{name} holds numbers that are not finite"
    return None


def require_data(levels: Tensor, targets: Tensor, grid: Grid) -> str | None:
    """The data of a Gaussian process: levels [N, S] of ``grid``, and as many targets [N]; N ≥ 1."""
    if not len(levels) or len(levels) != len(targets):
        return f"holds {len(levels)} policies and {len(targets)} measurements"
    if levels.min() < 0 or (levels.long() > torch.tensor(grid.maximum)).any():
        return "holds policies that the run's grid does not have"
    return None


def require_rows(rows: Sequence[Evaluation], grid: Grid) -> None:
    """Raise ``InputError`` for measured policies that are not on ``grid``, or have another ratio than it says."""
    levels = grid.encode([row.policy for row in rows])
    ratios = 1 - grid.kept(levels).double() / grid.structure.decoder_parameters
    for row, ratio in zip(rows, ratios.tolist(), strict=True):
        if abs(row.ratio - ratio) > _SAME:
            raise InputError("ratio", row.ratio, f"is not that of its policy, {ratio}", "Restore the file from a copy")


def require_model_files(files: Sealed, folder: str, recorded: Mapping[str, str], weights: bool) -> None:
    """Raise ``InputError`` for a file of a run's own model that is gone or has not the SHA-256 that was ``recorded``;
    ``weights`` says whether those are looked at as well."""
    for name, sha256 in recorded.items():
        if name.endswith(".safetensors") and not weights:
            continue
        try:
            same = sha256_of(files.folder / folder / name) == sha256
        except OSError as error:
            raise files.damaged(f"{folder}/{name}", f"cannot be read ({error.strerror})") from None
        if not same:
            raise files.damaged(f"{folder}/{name}", "does not match its checksum: it is damaged, or was changed")


def _not_finite(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = _FLOATS
) -> str | None:
    if tensor is None or tensor.dtype not in dtypes or tensor.shape != shape:
        return f"{name} is {_shown(tensor)}, not {' or '.join(map(_name, dtypes))} {list(shape)}"
    return None if _finite(tensor) else f"{name} holds numbers that are not finite"


def _finite(tensor: Tensor) -> bool:
    """In one pass that allocates nothing: NaN is the smallest and the largest of whatever it is among."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in torch.aminmax(tensor))


def _shown(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{_name(tensor.dtype)} {list(tensor.shape)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
