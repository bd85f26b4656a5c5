"""A run: what ``ppf fit`` leaves behind on disk, and the answers that need no weights.

RUN/run.json                 model, fingerprint, structure, settings, texts, state; once complete, all checksums
RUN/texts.safetensors        token sequences of calibration and evaluation
RUN/statistics/layer-000…    calibration statistics and ranking of each layer
RUN/library/layer-000…       refitted o and down of each level
RUN/first.safetensors        what every level loses, by calibration alone
RUN/experience.sqlite        measured policies
RUN/model                    the dense model, if it was fitted from memory, or trained for all sizes
RUN/rounds.json              how far the predictor was off at the agent's own policies, round by round
RUN/predictor.safetensors, RUN/agent.safetensors; not there after a fit without evaluations

Every file is sealed (:mod:`ppf.storage.sealed`), and every row of the experience has a checksum; RUN/model has them in
run.json. What is read is checked first, against these and for values that no fit writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...checkpoint import fingerprint, recall
from ...choose.additive import Additive
from ...choose.agent import Agent
from ...choose.answers import Answers
from ...choose.budget import Budget, RatioBudget
from ...choose.measured import Measured
from ...choose.predictor import Prediction, Predictor, make_predictor
from ...choose.predictor.gaussian import GaussianProcess
from ...errors import InputError
from ...families import KINDS
from ...model.layer import LayerRanking
from ...model.policy import Policy
from ...model.structure import Structure
from ..calibration import LayerStatistics, Moments
from ..experience import SEARCH_ROUND, Experience
from ..rounds import Journal
from . import values
from .manifest import EXPERIENCE, in_memory, read_manifest, sealed
from .settings import Settings

MODEL, TEXTS = "model", "texts.safetensors"
FIRST, PREDICTOR, AGENT = "first.safetensors", "predictor.safetensors", "agent.safetensors"
_Module = TypeVar("_Module", bound=nn.Module)
# Files whose values were looked at in this process, with their seals.
_judged: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Answer:
    """A run's answer to a request; ``requested_ratio`` is None if that was in another unit.

    ``source`` says whose policy it is: the "agent"'s, that of "calibration" alone, one that was "measured" (moved onto
    the budget), or the "uniform" one, whichever the predictor prefers. Of a run without evaluations nothing is
    predicted: then both figures, in nats, are None; and the standard uncertainty is None if the run cannot know it
    (:attr:`Run.knows_uncertainty`).
    ``milliseconds`` is what it took, projection and predictor included.
    """

    policy: Policy
    requested_ratio: float | None
    delivered_ratio: float
    predicted_log_perplexity: float | None
    predicted_std: float | None
    milliseconds: float
    source: str = "agent"


class Run:
    """An opened run directory. What needs the model's weights is a :class:`ppf.fitting.session.Session`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.settings = Settings.from_dict(self.manifest["settings"])
        self.structure = Structure.from_dict(self.manifest["structure"])
        self.grid = self.settings.grid(self.structure)
        self.files = sealed(self.path, self.manifest)

    @cached_property
    def model_path(self) -> Path:
        """Where the dense checkpoint is: where it was when the run was fitted, or in the run if that was from memory.
        If it has gone from there, the hub or the GGUF file that it came from is asked again; raises ``InputError`` if
        that fails."""
        if in_memory(self.manifest):
            values.require_model_files(self.files, MODEL, self.manifest.get("model_files", {}), weights=False)
            return self.path / MODEL  # weights are checked before they are read: see require_model
        return recall(Path(self.manifest["model"]), self.manifest.get("source"))

    @property
    def is_complete(self) -> bool:
        """True once ``ppf fit`` has finished."""
        return self.manifest["state"] == "complete"

    @cached_property
    def experience(self) -> Experience:
        store = self.store(self.path / EXPERIENCE, new=False)
        if (known := self.manifest.get("experience")) is not None:
            store.require(known["rows"], known["checksum"])
        return store

    def store(self, path: Path, new: bool = True) -> Experience:
        """A store of measurements of this run's policies; see :class:`ppf.fitting.experience.Experience`."""
        return Experience(path, self.files.owner, new, lambda rows: values.require_rows(rows, self.grid))

    @cached_property
    def predictor(self) -> Predictor:
        """Raises ``InputError`` for a run without evaluations, which has none."""
        self._require_evaluations("predictor")
        found = self._loaded(make_predictor(self.settings.predictor, self.grid), PREDICTOR)
        if isinstance(found, GaussianProcess) and (
            problem := values.require_data(found.levels, found.targets, self.grid)
        ):
            raise self.files.damaged(PREDICTOR, problem)
        return found

    @cached_property
    def agent(self) -> Agent:
        """Raises ``InputError`` for a run without evaluations, which has none."""
        self._require_evaluations("agent")
        return self._loaded(Agent(self.grid), AGENT)

    @cached_property
    def first(self) -> Additive | None:
        """What calibration alone knows; None in runs that were fitted before PPF kept it."""
        return self.read_first() if self.files.exists(FIRST) else None

    def read_first(self) -> Additive:
        """The same, of a run that must have it."""
        found = self._loaded(Additive(self.grid), FIRST)
        if found.damage.min() < 0:
            raise self.files.damaged(FIRST, "holds negative damage")
        return found

    @cached_property
    def _answers(self) -> Answers:
        if not self.has_predictor:
            return Answers(self.grid, None, None, self.first)
        # Of the fit alone: an answer is not another one after a search.
        rows = self.experience.rows(before_round=SEARCH_ROUND)
        values = torch.tensor([row.log_perplexity for row in rows], dtype=torch.float64)
        measured = Measured(self.grid, self.grid.encode([row.policy for row in rows]), values)
        return Answers(self.grid, self.agent, self.predictor, self.first, self.knows_uncertainty, measured)

    @property
    def has_predictor(self) -> bool:
        """Whether there were evaluations to learn a predictor and an agent from."""
        return self.settings.evaluations > 0

    @cached_property
    def knows_uncertainty(self) -> bool:
        """Whether standard uncertainties of what is predicted can be told: not if the fit's last round found them far
        too small at the agent's own answers, nor of a run of ``ppf recover --elastic``, which has no such round."""
        return self.has_predictor and Journal(self.files).knows

    def policy(self, ratio: float) -> Answer:
        """The run's policy for any ratio, with the predictor's opinion of it; see :meth:`answer`.

        Raises ``InputError`` for a ratio that is no share or beyond the structure, or while the fit is unfinished.
        """
        return self.answer(RatioBudget(self.grid, ratio))

    def answer(self, budget: Budget) -> Answer:
        """The run's policy for a budget: of the agent's, calibration's, the best measured and the uniform one the most
        promising by the predictor (:mod:`ppf.choose.answers`). Raises ``InputError`` while the fit is unfinished."""
        self.require_complete()
        answers = self._answers  # loading is not the answer's time
        start = time.perf_counter()
        offer = answers(budget)
        milliseconds = 1000 * (time.perf_counter() - start)
        policy, mean, std = self.grid.decode(offer.levels)[0], None, None
        if self.has_predictor:
            found = self.predict(policy)  # alone: among others its last digits would be different ones
            mean, std = float(found.mean), float(found.std) if self.knows_uncertainty else None
        ratio = self.grid.ratio(policy)
        return Answer(policy, budget.requested_ratio, ratio, mean, std, milliseconds, offer.source)

    def policies(self, ratios: Sequence[float]) -> list[Policy]:
        """The policies of :meth:`policy` for several ratios that can be had, at once."""
        self.require_complete()
        return self.grid.decode(self._answers.at(torch.tensor(ratios, dtype=torch.float64)))

    def predict(self, policy: Policy) -> Prediction:
        """The predictor's log-perplexity [1] for any policy on the grid."""
        self.require_complete()
        return self._sound(self.predictor(self.grid.encode([policy])))

    @cached_property
    def ranking(self) -> list[LayerRanking]:
        """Every layer's units by falling importance."""
        return [self._statistics(index)[0] for index in range(self.structure.layers)]

    def moments(self, index: int) -> LayerStatistics:
        """Moments of the inputs of one layer's output projections over the calibration text, in checkpoint order."""
        return self._statistics(index)[1]

    def sequences(self, part: str = "evaluation") -> Tensor:
        """Token sequences int64 [N, T] of "calibration" or "evaluation"."""
        return self._texts[part].to(torch.int64)

    def scored(self, part: str = "evaluation") -> Tensor | None:
        """The tokens of :meth:`sequences` that count, bool [N, T]: those of answers. None if all do."""
        return self._texts.get(f"{part}.scored")

    @property
    def _texts(self) -> dict[str, Tensor]:
        vocabulary, length = self.manifest["vocabulary"], self.settings.sequence_length
        return self.checked(TEXTS, lambda tensors: values.require_texts(tensors, vocabulary, length))

    def _statistics(self, index: int) -> tuple[LayerRanking, LayerStatistics]:
        name = layer_file("statistics", index)
        found = self.checked(name, lambda tensors: values.require_statistics(tensors, self.structure, index))
        moments = {
            kind: Moments(found[f"{kind}.mean"], found[f"{kind}.variance"])
            for kind in KINDS
            if self.structure.of(kind)[index].units
        }
        ranking = LayerRanking(**{kind: found[f"ranking.{kind}"] for kind in KINDS})
        return ranking, LayerStatistics(**{kind: moments.get(kind) for kind in KINDS})

    def factors(self, index: int) -> dict[str, Tensor]:
        """One layer's file of the library (:data:`ppf.fitting.factors.STORED`), memory-mapped."""
        name = layer_file("library", index)
        return self.checked(name, lambda tensors: values.require_factors(tensors, self.grid, index))

    def require_model(self) -> None:
        """Raise ``InputError`` if the checkpoint is gone or is no longer the one fitted."""
        values.require_model_files(self.files, MODEL, self.manifest.get("model_files", {}), weights=True)
        if fingerprint(self.model_path) != self.manifest["fingerprint"]:
            problem = f"is not the model that {self.path} was fitted on"
            remedy = "Put the original checkpoint back, or fit a new run"
            raise InputError("model", self.model_path, problem, remedy)

    def require_complete(self) -> None:
        """Raise ``InputError`` while the fit is unfinished."""
        if not self.is_complete:
            remedy = "Start the same `ppf fit` command again: it goes on where it stopped"
            raise InputError("run", self.path, "its fit is not finished", remedy)

    def _require_evaluations(self, what: str) -> None:
        if not self.has_predictor:
            problem = f"was fitted without evaluations, and has no {what}: its policies come from calibration alone"
            raise InputError("run", self.path, problem, "Fit a new run with --evaluations 24 or more")

    def checked(self, name: str, judge: Callable[[dict[str, Tensor]], str | None]) -> dict[str, Tensor]:
        """The tensors of one file of this run. Raises ``InputError`` naming the file if it is missing, may not be read
        or is damaged, and where ``judge`` says what is wrong with them; it is asked once a process."""
        tensors, key = self.files.tensors(name), (name, self.files.seal(name))
        if key not in _judged:
            if (problem := judge(tensors)) is not None:
                raise self.files.damaged(name, problem)
            _judged.add(key)
        return tensors

    def _loaded(self, module: _Module, name: str) -> _Module:
        expected = {key: tensor.dtype for key, tensor in module.state_dict().items()}
        state = self.checked(name, lambda tensors: values.require_state(tensors, expected))
        try:
            module.load_state_dict(state)
        except RuntimeError as error:  # tensors of another shape
            raise self.files.damaged(name, f"cannot be read ({' '.join(str(error).split())})") from None
        return module.eval()

    def _sound(self, prediction: Prediction) -> Prediction:
        """Raise ``InputError`` for a prediction that is not a number."""
        if not (prediction.mean.isfinite().all() and prediction.std.isfinite().all()):
            raise self.files.damaged(PREDICTOR, "predicts what is not a number")
        return prediction


def layer_file(folder: str, index: int) -> str:
    """Name of one layer's file inside a run."""
    return f"{folder}/layer-{index:03d}.safetensors"
