"""A run: what ``ppf fit`` leaves behind on disk, and the answers that need no weights.

RUN/run.json                 model, fingerprint, structure, settings, texts, state; once complete, all checksums
RUN/texts.safetensors        token sequences of calibration and evaluation
RUN/statistics/layer-000…    calibration statistics and ranking of each layer
RUN/library/layer-000…       refitted o and down of each level
RUN/experience.sqlite        measured policies
RUN/model                    the dense model, if it was fitted from memory
RUN/rounds.json              how far the predictor was off at the agent's own policies, round by round
RUN/predictor.safetensors, RUN/agent.safetensors

Every file is sealed (:mod:`ppf.storage.sealed`), and every row of the experience has a checksum; RUN/model has them in
run.json. What is read is checked first, against these and for values that no fit writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...checkpoint import fingerprint, recall
from ...choose.agent import Agent
from ...choose.budget.projection import check_ratio
from ...choose.predictor import Prediction, Predictor, make_predictor
from ...choose.predictor.gaussian import GaussianProcess
from ...errors import InputError
from ...families import KINDS
from ...model.layer import LayerRanking
from ...model.policy import Policy
from ...model.structure import Structure
from ..calibration import LayerStatistics, Moments
from ..experience import Experience
from . import values
from .manifest import EXPERIENCE, in_memory, read_manifest, sealed
from .settings import Settings

MODEL, TEXTS = "model", "texts.safetensors"
PREDICTOR, AGENT = "predictor.safetensors", "agent.safetensors"
_Module = TypeVar("_Module", bound=nn.Module)
# Files whose values were looked at in this process, with their seals.
_judged: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Answer:
    """The agent's answer to a request; ``requested_ratio`` is None if that was in another unit. ``milliseconds`` is the
    agent's time, projection included."""

    policy: Policy
    requested_ratio: float | None
    delivered_ratio: float
    predicted_log_perplexity: float
    predicted_std: float
    milliseconds: float


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
        found = self._loaded(make_predictor(self.settings.predictor, self.grid), PREDICTOR)
        if isinstance(found, GaussianProcess) and (
            problem := values.require_data(found.levels, found.targets, self.grid)
        ):
            raise self.files.damaged(PREDICTOR, problem)
        return found

    @cached_property
    def agent(self) -> Agent:
        return self._loaded(Agent(self.grid), AGENT)

    def policy(self, ratio: float) -> Answer:
        """The agent's policy for any ratio, with the predictor's opinion of it.

        Raises ``InputError`` for a ratio that is no share or beyond the structure, or while the fit is unfinished.
        """
        check_ratio(ratio, self.grid)
        self.require_complete()
        agent, predictor = self.agent, self.predictor  # loading is not the agent's time
        start = time.perf_counter()
        levels = agent(torch.tensor([float(ratio)], dtype=torch.float64))
        milliseconds = 1000 * (time.perf_counter() - start)
        prediction = self._sound(predictor(levels))
        policy = self.grid.decode(levels)[0]
        return Answer(
            policy, ratio, self.grid.ratio(policy), float(prediction.mean), float(prediction.std), milliseconds
        )

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
