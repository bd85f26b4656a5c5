"""``ppf profile``: how long every width takes on this device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..storage.locks import locked_folder, locked_result, sweep
from .console import lines, progress_bars, show
from .options import COUNT, Device, Json, Wait

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..choose.budget import Profile
    from ..deliver.profiling import Build
    from ..model.grid import Grid
    from ..model.policy import Policy
    from ..progress import Progress
    from ..storage.sealed import Sealed


def profile(
    path: Annotated[Path, typer.Argument(metavar="MODEL|RUN", help="A run, or a dense checkpoint.")],
    prefill: Annotated[
        int | None, typer.Option(callback=COUNT, help="Tokens of a prompt; 2048, or half of a shorter context.")
    ] = None,
    batch: Annotated[int, typer.Option(callback=COUNT, help="Prompts at once.")] = 1,
    decode: Annotated[
        int | None, typer.Option(callback=COUNT, help="Tokens each sequence holds when its next is generated.")
    ] = None,
    decode_batch: Annotated[int, typer.Option(callback=COUNT, help="Sequences that generate at once.")] = 1,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For a MODEL: where to write the profile.")
    ] = None,
    ffn_multiple: Annotated[
        int, typer.Option(callback=COUNT, help="For a MODEL: FFN widths are multiples of this.")
    ] = 64,
    device: Device = "auto",
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Measure the latency of every width on this device, for --latency-ms and --tokens-per-second."""
    from ..choose.budget.profile import PROFILE, save_profile
    from ..deliver.profiling import profile_facts
    from ..fast.timing import Workload, check_workload
    from ..fitting.run.manifest import is_run as found_run

    is_run = found_run(path)
    if output is None and not is_run:
        raise InputError("output", "(none)", "a MODEL has no folder for its profile", "Give --output FILE, or a RUN")
    grid, context, build = _open(path, is_run, ffn_multiple, device)
    usual = min(2048, context // 2)
    workloads = (
        Workload("prefill", batch, usual if prefill is None else prefill),
        Workload("decode", decode_batch, usual if decode is None else decode),
    )
    for workload in workloads:
        check_workload(workload, context)
    target = output or path / PROFILE
    with progress_bars() as progress, locked_result(target) if output else locked_folder(path, "run"):
        if output is None:
            sweep(path)
        facts = {"path": str(path)} | profile_facts(build(grid.dense()))
        profiles = _measure(grid, build, workloads, progress)
        save_profile(_files(path, is_run, target), facts, profiles, target.name)
    data = facts | {"output": str(target), "profiles": {p.workload.phase: p.to_dict() for p in profiles}}
    show(as_json, data, lines(_told(data, grid, profiles)))


def _files(path: Path, is_run: bool, target: Path) -> Sealed:
    """Where the file ``target`` belongs: to the run, or to itself."""
    from ..choose.budget.profile import PROFILE
    from ..fitting.run import Run
    from ..storage.sealed import Sealed

    if is_run and target.resolve() == (path / PROFILE).resolve():
        return Run(path).files
    return Sealed(target.parent, "", "output", "Measure it again with ppf profile")


def _open(path: Path, is_run: bool, ffn_multiple: int, device: str) -> tuple[Grid, int, Build]:
    """Grid and context of the model, and a builder of models by policy, which reads the weights when first called."""
    from functools import cache

    from .. import checkpoint
    from ..choose.budget.profile import require_equal_layers
    from ..families import family_of
    from ..fast.permute import identity
    from ..fitting.materialize import materialize
    from ..fitting.run import Run
    from ..model.geometry import structure_of
    from ..model.grid import Grid

    target = str(checkpoint.resolve_device(device))
    run = Run(path) if is_run else None
    model = run.model_path if run else path
    config = checkpoint.check_checkpoint(model)
    grid = run.grid if run else Grid(structure_of(family_of(config.model_type), config), ffn_multiple)
    require_equal_layers(grid.structure, "model", model)
    anything = Grid(grid.structure, grid.ffn_multiple)  # a portable grid has no policies with less attention
    decoder = cache(lambda: checkpoint.load_decoder(model, target))

    def build(policy: Policy) -> PreTrainedModel:
        # Which units stay makes no difference to the time they take.
        return materialize(decoder(), identity(decoder()), anything, policy)

    return grid, config.max_position_embeddings, build


def _measure(grid: Grid, build: Build, workloads: tuple, progress: Progress) -> list[Profile]:
    from ..deliver.profiling import measure_profile

    return [
        measure_profile(grid, build, w, lambda _, done, total, w=w: progress(f"profile {w.phase}", done, total))
        for w in workloads
    ]


def _told(data: dict[str, Any], grid: Grid, profiles: list[Profile]) -> dict[str, Any]:
    told = {"profile": data["output"], "measured on": f"{data['device']}, {data['dtype']}, {data['runner']}"}
    for p in profiles:
        least, most = p.costs(grid).range(grid)
        w = p.workload
        what = f"{w.batch} x {w.tokens} tokens" + (" held, a step" if w.phase == "decode" else "")
        told[w.phase] = f"{what}: {most:.3f} ms dense, {least:.3f} ms at the smallest policy"
    return told
