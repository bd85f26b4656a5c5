"""Which process of how many this is, and what they tell each other: torchrun's processes, over torch.distributed.

Without :func:`start`, or without torchrun, a process is the first and only one: every function here then answers at
once, and torch.distributed is not even imported. After it every process of the job must call the same functions here
in the same order. Objects go through gloo on the CPU, tensors on GPUs through NCCL.
"""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import InputError, PPFError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

GONE = "another process of this job has ended; start the same command again: it goes on where it stopped"

_TOLD = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
# A process may wait for the first one to train or to factorise; one that dies is noticed at once, whatever this says.
_PATIENCE = timedelta(hours=12)
# What all processes' blocks of a sum take together while they are added.
_BLOCK_BYTES = 256 << 20
_ENDED = re.compile(r"clos|reset|broken pipe|timed? ?out|abort|terminat|nccl|socket|connect|shut ?down", re.IGNORECASE)

_store: Any = None  # torchrun's key-value store, of which the group is made
_group: tuple[int, int] | None = None  # rank and number of processes once started


def launched() -> tuple[int, int]:
    """Rank and number of processes as torchrun's environment says; (0, 1) without it, or without a part of it."""
    if any(name not in os.environ for name in _TOLD):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def start() -> None:
    """Join torchrun's other processes. Does nothing without torchrun, for a job of one, or the second time."""
    global _store, _group
    if _group is not None or launched()[1] == 1:
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported: no warnings between our lines
    import torch
    from torch import distributed

    if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    with together():
        if not distributed.is_initialized():  # a caller's own script may have done it
            _store, number, count = next(distributed.rendezvous("env://"))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=_PATIENCE)
        _group = distributed.get_rank(), distributed.get_world_size()


def stop() -> None:
    """Leave the others; this process is one of one again. Nobody waits for anybody."""
    global _store, _group
    if _group is not None:
        from torch import distributed

        _store, _group = None, None
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return 0 if _group is None else _group[0]


def world() -> int:
    """How many processes there are."""
    return 1 if _group is None else _group[1]


def first() -> bool:
    """True in the process that writes files and prints."""
    return rank() == 0


def local_rank() -> int:
    """This process's number among those of its host."""
    return int(os.environ.get("LOCAL_RANK", 0))


def device(found: torch.device) -> torch.device:
    """The device of this process where the job asks for ``found``: "cuda" is its own GPU, one a process.

    Raises ``InputError`` for one GPU named for several processes, and where a host has fewer GPUs than processes.
    """
    if world() == 1 or found.type != "cuda":
        return found
    import torch

    own, there = local_rank(), torch.cuda.device_count()
    if found.index not in (None, own):
        raise InputError("device", found, "is one GPU for several processes", "Use --device cuda: one GPU a process")
    if own >= there:
        remedy = f"Use --nproc-per-node {there}, or --device cpu"
        raise InputError("device", found, f"this host has {there} GPUs for more processes than that", remedy)
    return torch.device("cuda", own)


def broadcast(value: T) -> T:
    """The first process's ``value``, which must pickle, in all of them; tensors in it must be on the CPU."""
    if world() == 1:
        return value
    from torch import distributed

    box = [value]
    with together():
        distributed.broadcast_object_list(box, 0, device=_cpu())
    return box[0]


def from_first(work: Callable[[], T]) -> T:
    """What ``work`` returns in the first process, in all of them; a ``PPFError`` of it is raised in all, too."""
    if world() == 1:
        return work()
    error, result = None, None
    if first():
        try:
            result = work()
        except PPFError as raised:
            error = raised
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result


def gather(value: T) -> list[T]:
    """Every process's ``value``, which must pickle, by rank; in all of them. Tensors in it must be on the CPU."""
    if world() == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * world()
    with together():
        distributed.all_gather_object(found, value)
    return found


def barrier() -> None:
    """Wait for all others."""
    gather(None)


def share(costs: Sequence[float]) -> list[int]:
    """Which items are this process's, ascending, given what each costs: the dearest first, each to whoever has least.

    The same in all processes; together they have every item once (longest processing time first: at most 4/3 of the
    best possible load).
    """
    return shares(costs, world())[rank()]


def shares(costs: Sequence[float], processes: int) -> list[list[int]]:
    """What :func:`share` gives each of so many processes."""
    load = [(0.0, number) for number in range(processes)]
    found: list[list[int]] = [[] for _ in load]
    for item in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        held, number = load[0]
        found[number].append(item)
        heapq.heapreplace(load, (held + costs[item], number))
    return [sorted(items) for items in found]


def halves(span: range) -> tuple[range, range]:
    """The two branches of a node of the tree of sums, whose leaves are ``span``; at least two of them."""
    middle = span.start + (len(span) + 1) // 2
    return range(span.start, middle), range(middle, span.stop)


def subtrees(leaves: int, processes: int) -> list[range]:
    """The subtree, as a span of leaves, that each process sums on its own: the largest is halved until all have one.

    Spans ascend; processes that are more than the leaves have empty ones.
    """
    spans = [range(leaves)]
    while len(spans) < min(processes, leaves):
        largest = max(range(len(spans)), key=lambda at: (len(spans[at]), -at))
        spans[largest : largest + 1] = halves(spans[largest])
    return spans + [range(leaves, leaves)] * (processes - len(spans))


def tree_sum(mine: Tensor, spans: Sequence[range]) -> Tensor:
    """Add all processes' ``mine``, in place and in the order of the tree, so that the same leaves give the same bits
    however many processes they were on.

    ``mine`` has the same shape [n, …], dtype and kind of device everywhere; ``spans`` are :func:`subtrees`. What a
    process without leaves brings is not added. Besides ``mine`` it takes a quarter of a GB, or one row of each.
    """
    if world() == 1:
        return mine
    import torch
    from torch import distributed

    row = mine[0].numel() * mine.element_size() * world()
    tree = range(spans[0].start, max(span.stop for span in spans))
    for block in mine.split(max(1, _BLOCK_BYTES // row)):
        found = [torch.empty_like(block) for _ in spans]
        with together():
            distributed.all_gather(found, block.contiguous())
        block.copy_(folded(tree, {span: part for span, part in zip(spans, found, strict=True) if span}))
    return mine


def folded(span: range, parts: dict[range, Tensor]) -> Tensor:
    """The sum over the leaves ``span``, as the tree has it, of branches whose sums are known."""
    if span in parts:
        return parts[span]
    left, right = halves(span)
    return folded(left, parts) + folded(right, parts)


def speak_for_all(say: Callable[[], None], code: int) -> int:
    """Call ``say`` in one process only, of all that fail: the first that comes here. The others wait until it has.

    Returns the exit code for all of them, which is that one's. Before :func:`start` all processes do the same, and the
    one of rank 0 is taken.
    """
    if _store is None:
        if launched()[0] == 0:
            say()
        return code
    try:
        if _store.add("ppf/failed", 1) > 1:
            _store.wait(["ppf/said"], timedelta(seconds=2))
            return int(_store.get("ppf/said"))
    except RuntimeError:  # whoever kept the store has gone, or the first one is still speaking
        if not first():
            return code
    say()
    with suppress(RuntimeError):
        _store.set("ppf/said", str(code))
    return code


@contextmanager
def together() -> Iterator[None]:
    """One line for what torch.distributed raises when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        if _ENDED.search(str(error)):
            raise PPFError(GONE) from error
        raise


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")
