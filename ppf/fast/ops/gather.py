"""The channel gather: pick rows or columns of weight matrices by index list. Shrinks a Llama physically.

``gather_rows``, ``gather_columns`` and ``gather_many`` take 2-D float16, bfloat16 or float32 tensors on the CPU or a
CUDA device; rows may lie any distance apart (a view ``w[:, :k]`` is read in place). Index lists are 1-D int32 or int64,
any order, repetitions allowed, and live on the host, where a ranking lives and where they are checked before anything
is written or launched; or they come as an :class:`~ppf.fast.ops.index.Index`, checked once and kept on each device
(which a CUDA graph needs). The raw ``torch.ops.ppf`` forms take either a host list or the int32 list that ``Index.on``
returned.

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

from ... import _C
from ...errors import InputError
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
    return torch.ops.ppf.gather_rows(x, _resolve(index, x, 0)[0])


def gather_columns(x: Tensor, index: Tensor | Index) -> Tensor:
    """``out[:, j] = x[:, index[j]]``: [R, C], [N] -> [R, N], contiguous, dtype and device of ``x``.

    Raises ``InputError`` for a wrong dtype, device or rank, ``IndexError`` for an entry outside [0, C).
    """
    return torch.ops.ppf.gather_columns(x, *_resolve(index, x, 1))


def gather_many(jobs: Sequence[tuple[Tensor, Tensor | Index, int]]) -> list[Tensor]:
    """Gathers (x [R, C], index [N], dim 0 = rows or 1 = columns) in a few launches; results in order.

    Raises what :func:`gather_rows` raises, naming the job; nothing is launched unless all jobs are sound.
    """
    if not jobs:
        return []
    if (direct := _direct(jobs)) is not None:
        return direct
    dims = [_check_dim(job, dim) for job, (_, _, dim) in enumerate(jobs)]
    resolved = [_resolve(index, x, dim, job) for job, (x, index, dim) in enumerate(jobs)]
    lists, units = zip(*resolved, strict=True)
    return torch.ops.ppf.gather_many([x for x, _, _ in jobs], list(lists), dims, list(units))


# ---------------------------------------------------------------------------------------------------------- arguments


def _name(argument: str, job: int | None) -> str:
    return argument if job is None else f"jobs[{job}].{argument}"


def _check_dim(job: int, dim: int) -> int:
    if dim not in (0, 1):
        raise InputError(f"jobs[{job}].dim", dim, "is not a dimension of a matrix", "Use 0 for rows, 1 for columns")
    return dim


def _check_x(x: Any, job: int | None) -> None:
    if isinstance(x, Tensor) and x.dtype in DTYPES and x.dim() == 2 and x.shape[0] < 2**31 and x.shape[1] < 2**31:
        return
    name = _name("x", job)
    if not isinstance(x, Tensor):
        raise InputError(name, type(x).__name__, "is not a tensor", "Pass a 2-D tensor")
    if x.dtype not in DTYPES:
        raise InputError(name, x.dtype, "cannot be gathered", "Use float16, bfloat16 or float32")
    if x.dim() != 2:
        raise InputError(name, list(x.shape), f"has {x.dim()} dimensions, 2 expected", "Reshape it to a matrix")
    raise InputError(name, list(x.shape), "has 2^31 or more rows or columns", "Gather it in parts")


def _resolve(index: Tensor | Index, x: Tensor, dim: int, job: int | None = None) -> tuple[Tensor, int]:
    """The list the op is called with, and its unit: a host tensor, checked there, or what ``Index.on`` returns."""
    _check_x(x, job)
    if isinstance(index, Index):
        if index.limit != x.shape[dim]:
            what = f"was checked against {index.limit}, but dimension {dim} of x has size {x.shape[dim]}"
            remedy = f"Build it with limit {x.shape[dim]}"
            raise InputError(_name("index", job), f"Index of {len(index)}", what, remedy)
        return index.on(x.device), index.unit
    check_index(_name("index", job), index)
    if index.is_cuda:
        value, remedy = (
            f"tensor on {index.device}",
            "Pass it on the CPU, or wrap it in ppf.fast.ops.index.Index (it waits once)",
        )
        raise InputError(_name("index", job), value, "cannot be checked without waiting for the GPU", remedy)
    return index, 1


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


def _gather_cpu(x: Tensor, index: Tensor, dim: int, job: int | None = None) -> Tensor:
    name = _name("index", job)
    _check_x(x, job)
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


def _send(lists: list[tuple[str, Tensor, int]], device: torch.device) -> tuple[list[Tensor], list[int]]:
    """Checks (name, host list, limit) triples and sends the lists in one asynchronous copy; also their units."""
    if torch.cuda.is_current_stream_capturing():
        remedy = "Wrap it in ppf.fast.ops.index.Index before the capture"
        raise InputError(lists[0][0], "tensor on cpu", "cannot be sent while a CUDA graph is captured", remedy)
    packed, units = pack(lists, pinned=True)
    return list(packed.to(device, non_blocking=True).split([values.numel() for _, values, _ in lists])), units


def _on_device(
    xs: list[Tensor], lists: list[Tensor], dims: list[int], units: list[int], many: bool
) -> tuple[list[Tensor], list[int]]:
    """The lists as int32 on the device of ``xs``: host lists are checked and sent, device lists taken as they are."""
    device = xs[0].device
    lists, units, host = list(lists), list(units), []
    for i, index in enumerate(lists):
        if not index.is_cuda:
            check_index(_name("index", i if many else None), index)
            host.append(i)
        elif index.dtype != torch.int32 or index.dim() != 1 or index.device != device or not index.is_contiguous():
            value, what = f"{index.dtype} on {index.device}", f"a 1-D int32 list on {device} expected"
            raise InputError(_name("index", i if many else None), value, what, "Use ppf.fast.ops.index.Index")
    if host:
        triples = [(_name("index", i if many else None), lists[i], xs[i].shape[dims[i]]) for i in host]
        for i, values, unit in zip(host, *_send(triples, device), strict=True):
            lists[i], units[i] = values, unit
    return lists, units


def _gather_cuda(
    xs: list[Tensor], lists: list[Tensor], dims: list[int], units: list[int], many: bool = False
) -> list[Tensor]:
    device = xs[0].device
    for i, x in enumerate(xs):
        _check_x(x, i if many else None)
        if x.device != device:
            raise InputError(f"jobs[{i}].x", x.device, f"another job is on {device}", "Make one call per device")
    lists, units = _on_device(xs, lists, dims, units, many)
    if not _cuda_ready(device.index):
        return [x.index_select(dim, index) for x, index, dim in zip(xs, lists, dims, strict=True)]
    outs, stream = [], torch.cuda.current_stream(device).cuda_stream
    at, size = 0, FIRST_LAUNCH
    while at < len(xs):
        part = slice(at, at + size)
        outs += _launch(xs[part], lists[part], dims[part], units[part], device.index, stream)
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


def _direct(jobs: Sequence[tuple[Tensor, Tensor | Index, int]]) -> list[Tensor] | None:
    """Results of a call that needs nothing of the dispatcher: checked lists, one GPU, no gradient; None for the rest.

    The dispatcher and the autograd of custom ops spend more host time on hundreds of jobs than the GPU on the first of
    them. Whatever is unusual or wrong takes the registered op, which also words the errors.
    """
    device = jobs[0][0].get_device() if isinstance(jobs[0][0], Tensor) else -1
    if device < 0 or torch.compiler.is_compiling() or not all(_plain(*job, device) for job in jobs):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x, _, _ in jobs) or not _cuda_ready(device):
        return None
    stream, outs = torch.cuda.current_stream(device).cuda_stream, []
    at, size, on = 0, FIRST_LAUNCH, torch.device("cuda", device)
    while at < len(jobs):
        fields = []
        for x, index, dim in jobs[at : at + size]:
            rows, columns = x.shape
            count = len(index)
            out = x.new_empty((count, columns) if dim == 0 else (rows, count))
            strides = (x.stride(0), columns if dim == 0 else count)
            addresses = (x.data_ptr(), out.data_ptr(), index.on(on).data_ptr())
            fields.append((*addresses, *strides, rows, columns, count, x.element_size(), dim, 4, index.unit))
            outs.append(out)
        _C.gather_cuda(fields, device, stream, 0)
        at, size = at + size, 2 * size
    return outs


def _plain(x: Tensor, index: Tensor | Index, dim: int, device: int) -> bool:
    """Whether a job is one that :func:`_direct` describes as it stands."""
    return (
        (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and type(index) is Index
        and x.get_device() == device
        and x.dtype in DTYPES
        and x.dim() == 2
        and (dim == 0 or dim == 1)
        and index.limit == x.size(dim)
        and x.size(1 - dim) < 2**31
        and x.stride(1) == 1
    )


def _rows_cpu(x: Tensor, index: Tensor) -> Tensor:
    return _gather_cpu(x, index, 0)


def _rows_cuda(x: Tensor, index: Tensor) -> Tensor:
    return _gather_cuda([x], [index], [0], [1])[0]


def _columns_cpu(x: Tensor, index: Tensor, unit: int = 1) -> Tensor:
    return _gather_cpu(x, index, 1)


def _columns_cuda(x: Tensor, index: Tensor, unit: int = 1) -> Tensor:
    return _gather_cuda([x], [index], [1], [unit])[0]


def _many_cpu(xs: list[Tensor], indices: list[Tensor], dims: list[int], units: list[int]) -> list[Tensor]:
    jobs = list(enumerate(zip(xs, indices, dims, strict=True)))
    for i, (x, index, dim) in jobs:  # all of them before the first is moved
        _check_x(x, i)
        check_index(_name("index", i), index)
        pack([(_name("index", i), index, x.shape[_check_dim(i, dim)])])
    return [_gather_cpu(x, index, dim, i) for i, (x, index, dim) in jobs]


def _many_cuda(xs: list[Tensor], indices: list[Tensor], dims: list[int], units: list[int]) -> list[Tensor]:
    for i, dim in enumerate(dims):
        _check_dim(i, dim)
    return _gather_cuda(xs, indices, dims, units, many=True)


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
