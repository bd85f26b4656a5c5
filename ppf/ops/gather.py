"""The channel gather: pick rows or columns of weight matrices by index list. Shrinks a Llama physically.

``gather_rows``, ``gather_columns`` and ``gather_many`` take 2-D float16, bfloat16 or float32 tensors on the CPU or a
CUDA device; rows may lie any distance apart (a view ``w[:, :k]`` is read in place). Index lists are 1-D int32 or int64,
any order, repetitions allowed, and live on the host, where a ranking lives and where they are checked before anything
is written or launched; or they come as an :class:`~ppf.ops.index.Index`, checked once and kept on each device (which a
CUDA graph needs). The raw ``torch.ops.ppf`` forms take either a host list or the int32 list that ``Index.on`` returned.

Gradients flow to the gathered tensors (the scatter-add of the result's gradient). Where the native code has no kernels
for a CUDA device, tensors there fall back to ``torch.index_select`` with one warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..errors import InputError
from .index import Index, check_index, pack
from .library import LIBRARY

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Describing a job costs the host a few microseconds, moving it costs the GPU more: the first jobs of a call go ahead,
# each further launch takes twice as many, and the GPU never waits.
FIRST_LAUNCH = 16


def gather_rows_reference(x: Tensor, index: Tensor) -> Tensor:
    """What :func:`gather_rows` computes: [R, C], [N] -> [N, C]."""
    return x.index_select(0, index.to(x.device))


def gather_columns_reference(x: Tensor, index: Tensor) -> Tensor:
    """What :func:`gather_columns` computes: [R, C], [N] -> [R, N]."""
    return x.index_select(1, index.to(x.device))


def gather_rows(x: Tensor, index: Tensor | Index) -> Tensor:
    """``out[i, :] = x[index[i], :]``: [R, C], [N] -> [N, C], contiguous, dtype and device of ``x``.

    Raises ``InputError`` for a wrong dtype, device or rank, ``IndexError`` for an entry outside [0, R).
    """
    return torch.ops.ppf.gather_rows(x, _resolve("index", index, x, 0))


def gather_columns(x: Tensor, index: Tensor | Index) -> Tensor:
    """``out[:, j] = x[:, index[j]]``: [R, C], [N] -> [R, N], contiguous, dtype and device of ``x``.

    Raises ``InputError`` for a wrong dtype, device or rank, ``IndexError`` for an entry outside [0, C).
    """
    unit = index.unit if isinstance(index, Index) else 1
    return torch.ops.ppf.gather_columns(x, _resolve("index", index, x, 1), unit)


def gather_many(jobs: Sequence[tuple[Tensor, Tensor | Index, int]]) -> list[Tensor]:
    """Gathers (x [R, C], index [N], dim 0 = rows or 1 = columns) in a few launches; results in order.

    Raises what :func:`gather_rows` raises, naming the job; nothing is launched unless all jobs are sound.
    """
    xs, lists, dims, units = [], [], [], []
    for i, (x, index, dim) in enumerate(jobs):
        xs.append(x)
        dims.append(_check_dim(i, dim))
        lists.append(_resolve(f"jobs[{i}].index", index, x, dim))
        units.append(index.unit if isinstance(index, Index) else 1)
    if not xs:
        return []
    return torch.ops.ppf.gather_many(xs, lists, dims, units)


# ---------------------------------------------------------------------------------------------------------- arguments


def _check_dim(job: int, dim: int) -> int:
    if dim not in (0, 1):
        raise InputError(f"jobs[{job}].dim", dim, "is not a dimension of a matrix", "Use 0 for rows, 1 for columns")
    return dim


def _check_x(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise InputError(name, type(x).__name__, "is not a tensor", "Pass a 2-D tensor")
    if x.dtype not in DTYPES:
        raise InputError(name, x.dtype, "cannot be gathered", "Use float16, bfloat16 or float32")
    if x.dim() != 2:
        raise InputError(name, list(x.shape), f"has {x.dim()} dimensions, 2 expected", "Reshape it to a matrix")
    if x.shape[0] >= 2**31 or x.shape[1] >= 2**31:
        raise InputError(name, list(x.shape), "has 2^31 or more rows or columns", "Gather it in parts")


def _resolve(name: str, index: Tensor | Index, x: Tensor, dim: int) -> Tensor:
    """The list the op is called with: a host tensor (checked there), or a checked int32 list on the device of ``x``."""
    if isinstance(index, Index):
        _check_x("x", x)
        if index.limit != x.shape[dim]:
            what = f"was checked against {index.limit}, but dimension {dim} of x has size {x.shape[dim]}"
            raise InputError(name, f"Index of {len(index)}", what, f"Build it with limit {x.shape[dim]}")
        return index.on(x.device)
    if not isinstance(x, Tensor):
        raise InputError("x", type(x).__name__, "is not a tensor", "Pass a 2-D tensor")
    check_index(name, index)
    if index.is_cuda:
        remedy = "Pass it on the CPU, or wrap it in ppf.ops.index.Index (one synchronisation)"
        raise InputError(name, f"tensor on {index.device}", "cannot be checked without waiting for the GPU", remedy)
    return index


# ---------------------------------------------------------------------------------------------------- implementations


def _rows_adjacent(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _empty_result(x: Tensor, count: int, dim: int) -> Tensor:
    return x.new_empty((count, x.shape[1]) if dim == 0 else (x.shape[0], count))


def _fields(x: Tensor, out: Tensor, index: int, index_size: int, count: int, dim: int, unit: int) -> tuple[int, ...]:
    """One job in the order of ``Fields`` in csrc/bindings.cpp."""
    addresses = (x.data_ptr(), out.data_ptr(), index)
    strides = (x.stride(0), out.shape[1])
    return (*addresses, *strides, x.shape[0], x.shape[1], count, x.element_size(), dim, index_size, unit)


def _gather_cpu(name: str, x: Tensor, index: Tensor, dim: int) -> Tensor:
    _check_x("x", x)
    check_index(name, index)
    if index.device.type != "cpu":
        raise InputError(name, f"tensor on {index.device}", "x is on the CPU", "Move the index list to the CPU")
    x, index = _rows_adjacent(x), index.contiguous()
    out = _empty_result(x, index.numel(), dim)
    fields = _fields(x, out, index.data_ptr(), index.element_size(), index.numel(), dim, 1)
    _C.gather_cpu(fields, name, torch.get_num_threads())
    return out


@lru_cache
def _cuda_ready(device: int) -> bool:
    """True if the native kernels run on this device; otherwise says why, once."""
    problem = _C.cuda_problem(device) if hasattr(_C, "cuda_problem") else "ppf was built without CUDA"
    if problem:
        message = (
            f"ppf's CUDA gather is not available on cuda:{device} ({problem}): using torch.index_select, 2-3x slower"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return not problem


def _on_device(device: torch.device, lists: list[tuple[str, Tensor, int]]) -> tuple[list[Tensor], list[int]]:
    """Checks host lists and sends them in one asynchronous copy; lists already on the device come back as they are."""
    host = [item for item in lists if not item[1].is_cuda]
    if host and torch.cuda.is_current_stream_capturing():
        remedy = "Wrap it in ppf.ops.index.Index before the capture"
        raise InputError(host[0][0], "tensor on cpu", "cannot be sent while a CUDA graph is captured", remedy)
    packed, units = pack(host, pinned=True) if host else (torch.empty(0, dtype=torch.int32), [])
    parts = iter(packed.to(device, non_blocking=True).split([item[1].numel() for item in host]))
    found = iter(units)
    sent, all_units = [], []
    for name, values, _ in lists:
        if not values.is_cuda:
            sent.append(next(parts))
            all_units.append(next(found))
            continue
        if values.device != device or values.dtype != torch.int32 or not values.is_contiguous():
            found_list = f"{values.dtype} on {values.device}"
            raise InputError(name, found_list, f"an int32 list on {device} expected", "Use ppf.ops.index.Index")
        sent.append(values)
        all_units.append(0)
    return sent, all_units


def _gather_cuda(
    names: list[str], xs: list[Tensor], lists: list[Tensor], dims: list[int], units: list[int]
) -> list[Tensor]:
    device = xs[0].device
    for name, x, index in zip(names, xs, lists, strict=True):
        _check_x("x", x)
        check_index(name, index)
        if x.device != device:
            raise InputError("x", x.device, f"another job is on {device}", "Make one call per device")
    triples = [(name, index, x.shape[dim]) for name, x, index, dim in zip(names, xs, lists, dims, strict=True)]
    sent, found = _on_device(device, triples)
    if not _cuda_ready(device.index):
        return [x.index_select(dim, index) for x, index, dim in zip(xs, sent, dims, strict=True)]
    outs, stream = [], torch.cuda.current_stream(device).cuda_stream
    at, size = 0, FIRST_LAUNCH
    while at < len(xs):
        part = slice(at, at + size)
        kept = [unit or given for unit, given in zip(found[part], units[part], strict=True)]
        outs += _launch(xs[part], sent[part], dims[part], kept, device.index, stream)
        at, size = at + size, 2 * size
    return outs


def _launch(
    xs: list[Tensor], lists: list[Tensor], dims: list[int], units: list[int], device: int, stream: int
) -> list[Tensor]:
    """Results of checked jobs; torch's allocator keeps what they read alive until the stream is done with it."""
    xs = [_rows_adjacent(x) for x in xs]
    outs = [_empty_result(x, index.numel(), dim) for x, index, dim in zip(xs, lists, dims, strict=True)]
    jobs = [
        _fields(x, out, index.data_ptr(), 4, index.numel(), dim, unit)
        for x, out, index, dim, unit in zip(xs, outs, lists, dims, units, strict=True)
    ]
    _C.gather_cuda(jobs, device, stream, 0)
    return outs


def _rows_cpu(x: Tensor, index: Tensor) -> Tensor:
    return _gather_cpu("index", x, index, 0)


def _rows_cuda(x: Tensor, index: Tensor) -> Tensor:
    return _gather_cuda(["index"], [x], [index], [0], [1])[0]


def _columns_cpu(x: Tensor, index: Tensor, unit: int = 1) -> Tensor:
    return _gather_cpu("index", x, index, 1)


def _columns_cuda(x: Tensor, index: Tensor, unit: int = 1) -> Tensor:
    return _gather_cuda(["index"], [x], [index], [1], [unit])[0]


def _many_cpu(xs: list[Tensor], indices: list[Tensor], dims: list[int], units: list[int]) -> list[Tensor]:
    for i, (x, index, dim) in enumerate(zip(xs, indices, dims, strict=True)):
        _check_x(f"jobs[{i}].x", x)
        pack([(f"jobs[{i}].index", index, x.shape[_check_dim(i, dim)])])
    jobs = enumerate(zip(xs, indices, dims, strict=True))
    return [_gather_cpu(f"jobs[{i}].index", x, index, dim) for i, (x, index, dim) in jobs]


def _many_cuda(xs: list[Tensor], indices: list[Tensor], dims: list[int], units: list[int]) -> list[Tensor]:
    names = [f"jobs[{i}].index" for i in range(len(xs))]
    return _gather_cuda(names, xs, indices, dims, units)


def _rows_fake(x: Tensor, index: Tensor) -> Tensor:
    return _empty_result(x, index.shape[0], 0)


def _columns_fake(x: Tensor, index: Tensor, unit: int = 1) -> Tensor:
    return _empty_result(x, index.shape[0], 1)


def _many_fake(xs: list[Tensor], indices: list[Tensor], dims: list[int], units: list[int]) -> list[Tensor]:
    return [_empty_result(x, index.shape[0], dim) for x, index, dim in zip(xs, indices, dims, strict=True)]


# ---------------------------------------------------------------------------------------------------------- gradients


def _scatter_add(gradient: Tensor, index: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    return gradient.new_zeros(shape).index_add_(dim, index.to(gradient.device), gradient)


def _setup_one(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(inputs[1])


def _rows_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _scatter_add(gradient, ctx.saved_tensors[0], ctx.shape, 0), None


def _columns_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return _scatter_add(gradient, ctx.saved_tensors[0], ctx.shape, 1), None, None


def _setup_many(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, indices, ctx.dims, _ = inputs
    ctx.shapes = [x.shape for x in xs]
    ctx.save_for_backward(*indices)


def _many_backward(ctx: Any, gradients: list[Tensor]) -> tuple[list[Tensor], list[None], None, None]:
    parts = zip(gradients, ctx.saved_tensors, ctx.shapes, ctx.dims, strict=True)
    return [_scatter_add(*part) for part in parts], [None] * len(ctx.shapes), None, None


def _register(schema: str, cpu: Any, cuda: Any, fake: Any, setup: Any, backward: Any) -> None:
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"ppf::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"ppf::{name}", backward, setup_context=setup, lib=LIBRARY)


_register(
    "gather_rows(Tensor x, Tensor index) -> Tensor", _rows_cpu, _rows_cuda, _rows_fake, _setup_one, _rows_backward
)
_register(
    "gather_columns(Tensor x, Tensor index, int unit=1) -> Tensor",
    _columns_cpu, _columns_cuda, _columns_fake, _setup_one, _columns_backward,
)  # fmt: skip
_register(
    "gather_many(Tensor[] xs, Tensor[] indices, int[] dims, int[] units) -> Tensor[]",
    _many_cpu, _many_cuda, _many_fake, _setup_many, _many_backward,
)  # fmt: skip
