"""A run's first answer: what every level of every sub-layer loses, known from calibration before any evaluation.

The library knows how much of a sub-layer's output a level loses. What that matters has two witnesses
(:mod:`ppf.fitting.curvature`): the curvature of the loss along the output, and the output's share of the stream that it
is added to. The first says too little of outputs that are most of the stream, the second nothing of directions that
nobody reads; between them they are right more often than either (dev/LOG.md). :class:`ppf.choose.additive.Additive`
adds the damages up.
"""

from __future__ import annotations

from torch import Tensor

from .. import ranks
from ..choose.additive import Additive
from ..choose.agent import error_energies
from ..model.grid import Grid
from ..model.precision import compute_dtype
from .curvature import Curvatures, curvatures
from .run.directory import FIRST
from .session import Session


def damages(energies: Tensor, found: Curvatures) -> Tensor:
    """Damage of every level, fp64 [S, K]: its error energy [S, K] times the geometric mean of curvature and share; on
    the scale of nats a token."""
    return energies.double() * (found.gate * found.share).sqrt()[:, None]


def first_answer(session: Session) -> Additive:
    """The run's first answer: from its file if that is there, else found and written. All processes of a job call this
    together."""
    run = session.run
    if not ranks.from_first(lambda: run.files.exists(FIRST)):
        ranks.from_first(lambda: _find(session))
    return run.read_first()


def energies_of(session: Session, grid: Grid) -> Tensor:
    """The library's error energies fp32 [S, K]."""
    return error_energies([session.library.error(sublayer) for sublayer in range(grid.sublayers)], grid)


def _find(session: Session) -> None:
    run, device = session.run, session.device
    decoder = session.permuted.to(compute_dtype(session.permuted.dtype, device))
    text, scored = run.sequences("calibration"), run.scored("calibration")
    # A few thousand tokens give two digits. A GPU's backward pass is not the same to the last bit each time; this is.
    rough = (part.bfloat16().double() for part in curvatures(decoder, text, run.settings.seed, scored))
    found = Additive(run.grid, damages(energies_of(session, run.grid), Curvatures(*rough)))
    run.files.write_safetensors(FIRST, found.state_dict())
