"""A run with other weights: what a fit has learnt about units and policies stays, what was measured is measured anew.

Rankings, the library's regressions, texts and the agent are carried over: regressions are of the activations, and give
the refit of any weights. Perplexities are not: some policies are measured on the new weights, and a predictor learns
from these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .._version import versions
from ..checkpoint import fingerprint
from ..checkpoint.hashes import hash_folder
from ..choose.candidates.sampling import RATIO_RANGE
from ..model.policy import Policy
from ..model.stream import Placement
from ..progress import Progress, silent
from ..storage.files import new_directory
from ..timings import seconds
from .evaluation.measurement import measure_many
from .experience import Experience
from .first import energies_of
from .learning import Learning, learn_predictor
from .run import Run
from .run.directory import AGENT, FIRST, MODEL, PREDICTOR, TEXTS, layer_file
from .run.manifest import EXPERIENCE, read_manifest, sealed, write_manifest
from .search.exploration import initial_proposals
from .session import Session
from .stages import finish

# What of a run's manifest is as true of its weights' successors.
_KEPT = "structure", "settings", "texts", "files", "vocabulary", "read_as", "own_answers", "rankings"
# Policies that are measured: the dense, uniform and random ones of a fit's first round, then the agent's own.
_FIRST, _OWN = 24, 48
_EFFORT = 2.0


def write_retrained(
    run: Run, output: Path, write_model: Callable[[Path], None], about: Callable[[Session], dict[str, Any]], *,
    device: torch.device, placement: Placement | None = None, force: bool = False, progress: Progress = silent,
) -> None:  # fmt: skip
    """Write ``output``, the run ``run`` with the dense model that ``write_model`` writes into the folder it is given:
    the same architecture, its units in checkpoint order.

    ``about`` is asked last what the manifest says under "elastic"; it may measure with the new run's session. All or
    nothing, as :func:`ppf.storage.files.new_directory`; raises ``InputError`` as that does, and for a damaged ``run``.
    """
    started, before = time.perf_counter(), seconds()
    with new_directory(output, force) as folder:
        write_model(folder / MODEL)
        _carry_over(run, folder, output)
        session = Session(Run(folder), device, placement=placement)
        if run.has_predictor:
            _measure(session, list(_proposals(run).items()), progress)
        manifest = read_manifest(folder) | {"elastic": about(session)}
        session.run.manifest = manifest
        finish(session, time.perf_counter() - started, before)


def _carry_over(run: Run, folder: Path, output: Path) -> None:
    """All files that do not depend on the weights, sealed as the new run's."""
    manifest = {name: run.manifest[name] for name in _KEPT if name in run.manifest} | {
        "fingerprint": fingerprint(folder / MODEL),
        "model": str(output.resolve() / MODEL),
        "source": {"kind": "recovered"},
        "model_files": hash_folder(folder / MODEL),
        "versions": versions(),
        "state": "fitting",
    }
    files = sealed(folder, manifest)
    for part in ("statistics", "library"):
        (folder / part).mkdir()
    layers = range(run.structure.layers)
    learnt = [name for name in (FIRST, AGENT) if run.files.exists(name)]
    for name in (TEXTS, *learnt, *(layer_file(part, at) for part in ("statistics", "library") for at in layers)):
        files.write_safetensors(name, run.files.tensors(name))
    Experience(folder / EXPERIENCE, files.owner).close()
    write_manifest(folder, manifest)


def _measure(session: Session, proposals: Sequence[tuple[Policy, str]], progress: Progress) -> None:
    """Measure policies, each with its source, and learn to predict from them."""
    run, evaluator = session.run, session.evaluator()
    for start in range(0, len(proposals), evaluator.chunk):
        policies, sources = zip(*proposals[start : start + evaluator.chunk], strict=True)
        measure_many(evaluator, run.experience, policies, 0, sources)
        progress("evaluate", len(run.experience), len(proposals))
    how = Learning(run.settings.predictor, run.settings.agent, energies_of(session, run.grid))
    rows, seed = run.experience.rows(), run.settings.seed
    predictor = learn_predictor(run.grid, rows, seed, session.device, _EFFORT, how)
    run.files.write_safetensors(PREDICTOR, predictor.state_dict())


def _proposals(run: Run) -> dict[Policy, str]:
    """The policies that ``run`` gives, on a fine grid of ratios, and those of a fit's first round."""
    low, high = RATIO_RANGE
    own = run.policies(torch.linspace(low, min(high, run.grid.maximum_ratio), _OWN, dtype=torch.float64).tolist())
    first = initial_proposals(run.grid, _FIRST, run.settings.seed, run.first)
    return dict.fromkeys(own, "run") | dict(first)
