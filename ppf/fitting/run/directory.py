"""A run: what ``ppf fit`` leaves behind on disk, and the answers that need no weights.

RUN/run.json                 model, fingerprint, structure, settings, texts, state
RUN/texts.safetensors        token sequences of calibration and evaluation
RUN/statistics/layer-000…    calibration statistics and ranking of each layer
RUN/library/layer-000…       refitted o and down of each level
RUN/experience.sqlite        measured policies
RUN/model                    the dense model, if it was fitted from memory
RUN/rounds.json              how far the predictor was off at the agent's own policies, round by round
RUN/predictor.safetensors, RUN/agent.safetensors
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...checkpoint import fingerprint, recall
from ...choose.agent import Agent
from ...choose.budget.projection import check_ratio
from ...choose.predictor import Prediction, Predictor, make_predictor
from ...errors import InputError
from ...families import KINDS
from ...model.layer import LayerRanking
from ...model.policy import Policy
from ...model.structure import Structure
from ..calibration import LayerStatistics, Moments
from ..experience import Experience
from .settings import Settings

MANIFEST, ROUNDS, MODEL = "run.json", "rounds.json", "model"
_Module = TypeVar("_Module", bound=nn.Module)
# What every manifest has, with the type of its JSON value.
_FIELDS = {"model": str, "fingerprint": str, "structure": dict, "settings": dict, "texts": dict, "state": str}


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

    @cached_property
    def model_path(self) -> Path:
        """Where the dense checkpoint is: where it was when the run was fitted, or in the run if that was from memory.
        If it has gone from there, the hub or the GGUF file that it came from is asked again; raises ``InputError`` if
        that fails."""
        source = self.manifest.get("source")
        if source is not None and source["kind"] == "memory":
            return self.path / MODEL
        return recall(Path(self.manifest["model"]), source)

    @property
    def is_complete(self) -> bool:
        """True once ``ppf fit`` has finished."""
        return self.manifest["state"] == "complete"

    @cached_property
    def experience(self) -> Experience:
        return Experience(self.path / "experience.sqlite")

    @cached_property
    def predictor(self) -> Predictor:
        return self._loaded(make_predictor(self.settings.predictor, self.grid), "predictor.safetensors")

    @cached_property
    def agent(self) -> Agent:
        return self._loaded(Agent(self.grid), "agent.safetensors")

    def policy(self, ratio: float) -> Answer:
        """The agent's policy for any ratio, with the predictor's opinion of it.

        Raises ``InputError`` for a ratio that is no share or beyond the structure, or while the fit is unfinished.
        """
        check_ratio(ratio, self.grid)
        self.require_complete()
        agent, predictor = self.agent, self.predictor  # loading is not the agent's time
        start = time.perf_counter()
        levels = agent(torch.tensor([float(ratio)]))
        milliseconds = 1000 * (time.perf_counter() - start)
        prediction = predictor(levels)
        policy = self.grid.decode(levels)[0]
        return Answer(
            policy, ratio, self.grid.ratio(policy), float(prediction.mean), float(prediction.std), milliseconds
        )

    def predict(self, policy: Policy) -> Prediction:
        """The predictor's log-perplexity [1] for any policy on the grid."""
        self.require_complete()
        return self.predictor(self.grid.encode([policy]))

    @cached_property
    def ranking(self) -> list[LayerRanking]:
        """Every layer's units by falling importance."""
        found = []
        for index in range(self.structure.layers):
            tensors = self.tensors(layer_file("statistics", index), *(f"ranking.{kind}" for kind in KINDS))
            found.append(LayerRanking(**{kind: tensors[f"ranking.{kind}"] for kind in KINDS}))
        return found

    def moments(self, index: int) -> LayerStatistics:
        """Moments of the inputs of one layer's output projections over the calibration text, in checkpoint order."""
        kinds = [kind for kind in KINDS if self.structure.of(kind)[index].units]
        names = [f"{kind}.{part}" for kind in kinds for part in ("mean", "variance")]
        tensors = self.tensors(layer_file("statistics", index), *names)
        found = {kind: Moments(tensors[f"{kind}.mean"], tensors[f"{kind}.variance"]) for kind in kinds}
        return LayerStatistics(**{kind: found.get(kind) for kind in KINDS})

    def sequences(self, part: str = "evaluation") -> Tensor:
        """Token sequences int64 [N, T] of "calibration" or "evaluation"."""
        return self.tensors("texts.safetensors", part)[part].to(torch.int64)

    def require_model(self) -> None:
        """Raise ``InputError`` if the checkpoint is gone or is no longer the one fitted."""
        if fingerprint(self.model_path) != self.manifest["fingerprint"]:
            problem = f"is not the model that {self.path} was fitted on"
            raise InputError("model", self.model_path, problem, "Put the original checkpoint back, or fit a new run")

    def require_complete(self) -> None:
        """Raise ``InputError`` while the fit is unfinished."""
        if not self.is_complete:
            remedy = "Start the same `ppf fit` command again: it goes on where it stopped"
            raise InputError("run", self.path, "its fit is not finished", remedy)

    def tensors(self, name: str | Path, *needed: str) -> dict[str, Tensor]:
        """The tensors of one file of this run; raises ``InputError`` if it is damaged or lacks one that is needed."""
        try:
            tensors = load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise self._damaged(name, error) from None
        for tensor in needed:
            if tensor not in tensors:
                raise self._damaged(name, KeyError(tensor))
        return tensors

    def _loaded(self, module: _Module, name: str) -> _Module:
        try:
            module.load_state_dict(self.tensors(name))
        except RuntimeError as error:  # tensors of another name or shape
            raise self._damaged(name, error) from None
        return module.eval()

    def _damaged(self, name: str | Path, error: Exception) -> InputError:
        remedy = "Start the same `ppf fit` command again if it was not finished, or fit a new run"
        problem = f"cannot be read ({' '.join(str(error).split())[:200]})"
        return InputError("run", self.path / name, problem, remedy)


def layer_file(folder: str, index: int) -> Path:
    """Path of one layer's file inside a run."""
    return Path(folder) / f"layer-{index:03d}.safetensors"


def read_manifest(path: Path) -> dict[str, Any]:
    """The contents of ``run.json``. Raises ``InputError`` if ``path`` is no run."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, kind in _FIELDS.items():
            if not isinstance(manifest[name], kind):
                raise TypeError(name)
        Settings.from_dict(manifest["settings"]).grid(Structure.from_dict(manifest["structure"]))
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "no such folder" if not path.is_dir() else f"no readable {MANIFEST} in it ({type(error).__name__})"
        raise InputError("run", path, reason, "Give a folder that `ppf fit --output` made") from None
