"""A run: what ``ppf fit`` leaves behind, and everything one can ask of it afterwards.

RUN/run.json                 model, fingerprint, structure, settings, texts, state
RUN/texts.safetensors        token sequences of calibration and evaluation
RUN/statistics/layer-000…    calibration statistics and ranking of each layer
RUN/library/layer-000…       refitted o and down of each level
RUN/experience.sqlite        measured policies
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
from transformers import LlamaForCausalLM, PreTrainedModel

from ... import checkpoint
from ...choose.agent import Agent
from ...choose.budget.projection import check_ratio
from ...choose.predictor import Prediction, Predictor, make_predictor
from ...errors import InputError
from ...model.policy import Policy
from ...model.precision import compute_dtype
from ...model.structure import Structure
from ...model.weights import DecoderWeights, LayerRanking
from ..calibration import Moments
from ..evaluation import Evaluator
from ..experience import Experience
from ..library import TENSORS, Library, fits_on_device, load_refits
from ..materialise import materialize
from .settings import Settings

MANIFEST, ROUNDS = "run.json", "rounds.json"
_Module = TypeVar("_Module", bound=nn.Module)
# What every manifest has, with the type of its JSON value.
_FIELDS = {"model": str, "fingerprint": str, "structure": dict, "settings": dict, "texts": dict, "state": str}


@dataclass(frozen=True)
class Answer:
    """The agent's answer to a requested ratio. ``milliseconds`` is the agent's time, projection included."""

    policy: Policy
    requested_ratio: float
    delivered_ratio: float
    predicted_log_perplexity: float
    predicted_std: float
    milliseconds: float


class Run:
    """An opened run directory. Weights are loaded when first needed; :meth:`policy` needs none."""

    def __init__(self, path: str | Path, device: str = "cpu", dense: LlamaForCausalLM | None = None):
        """Open ``path``; ``dense`` is the run's model if the caller has it loaded already."""
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self.device = checkpoint.resolve_device(device)
        self.settings = Settings.from_dict(self.manifest["settings"])
        self.structure = Structure(**self.manifest["structure"])
        self.grid = self.settings.grid(self.structure)
        if dense is not None:
            self.dense = dense

    @property
    def model_path(self) -> Path:
        """Where the dense checkpoint was when the run was fitted."""
        return Path(self.manifest["model"])

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
    def dense(self) -> LlamaForCausalLM:
        """The dense model. Raises ``InputError`` if the checkpoint is gone or is no longer the one fitted."""
        self.require_model()
        return checkpoint.load_dense(self.model_path, device=str(self.device))

    def require_model(self) -> None:
        """Raise ``InputError`` if the checkpoint is gone or is no longer the one fitted."""
        if checkpoint.fingerprint(self.model_path) != self.manifest["fingerprint"]:
            problem = f"is not the model that {self.path} was fitted on"
            raise InputError("model", self.model_path, problem, "Put the original checkpoint back, or fit a new run")

    @cached_property
    def weights(self) -> DecoderWeights:
        """The dense weights in checkpoint order and dtype."""
        return DecoderWeights.from_model(self.dense)

    @cached_property
    def permuted(self) -> DecoderWeights:
        """The dense weights with every layer's units in ranking order."""
        return self.weights.permuted(self.ranking)

    @cached_property
    def ranking(self) -> list[LayerRanking]:
        names = "ranking.attention", "ranking.ffn"
        files = (layer_file("statistics", index) for index in range(self.structure.layers))
        return [LayerRanking(*map(self._tensors(file, *names).get, names)) for file in files]

    def moments(self, index: int) -> tuple[Moments, Moments]:
        """Channel moments of one layer's o and down inputs over the calibration text, in checkpoint order."""
        names = [f"{kind}.{part}" for kind in ("attention", "ffn") for part in ("mean", "variance")]
        tensors = self._tensors(layer_file("statistics", index), *names)
        return Moments(*(tensors[name] for name in names[:2])), Moments(*(tensors[name] for name in names[2:]))

    @cached_property
    def library(self) -> Library:
        """All refits in the checkpoint's dtype; their factors on the device if there is room, else mapped files."""
        layers = self.permuted.layers
        room = fits_on_device(self.grid, self.weights.dtype, self.device)
        files = (self._tensors(layer_file("library", index), *TENSORS) for index in range(self.structure.layers))
        pairs = [load_refits(tensors, layer, self.grid, room) for tensors, layer in zip(files, layers, strict=True)]
        return Library([attention for attention, _ in pairs] + [ffn for _, ffn in pairs])

    def sequences(self, part: str = "evaluation") -> Tensor:
        """Token sequences int64 [N, T] of "calibration" or "evaluation"."""
        return self._tensors("texts.safetensors", part)[part].to(torch.int64)

    def evaluator(
        self, dtype: torch.dtype | None = None, refit: bool = True, sequences: Tensor | None = None
    ) -> Evaluator:
        """Masked evaluation of this run's model on its evaluation text (or on ``sequences`` int64 [N, T])."""
        dtype = dtype or compute_dtype(self.weights.dtype, self.device)
        sequences = self.sequences() if sequences is None else sequences
        return Evaluator(self.permuted.to(dtype), self.grid, sequences, self.library.to(dtype) if refit else None)

    def materialize(self, policy: Policy, refit: bool = True) -> PreTrainedModel:
        """The physically smaller model of ``policy``, in the checkpoint's dtype on this run's device."""
        library = self.library if refit else None
        model = materialize(self.dense.config, self.weights, self.ranking, self.grid, policy, library)
        model.generation_config = self.dense.generation_config
        return model

    def require_complete(self) -> None:
        """Raise ``InputError`` while the fit is unfinished."""
        if not self.is_complete:
            remedy = "Start the same `ppf fit` command again: it goes on where it stopped"
            raise InputError("run", self.path, "its fit is not finished", remedy)

    def _loaded(self, module: _Module, name: str) -> _Module:
        try:
            module.load_state_dict(self._tensors(name))
        except RuntimeError as error:  # tensors of another name or shape
            raise self._damaged(name, error) from None
        return module.eval()

    def _tensors(self, name: str | Path, *needed: str) -> dict[str, Tensor]:
        """The tensors of one file of this run; raises ``InputError`` if it is damaged or lacks one that is needed."""
        try:
            tensors = load_file(self.path / name)
        except (OSError, SafetensorError) as error:
            raise self._damaged(name, error) from None
        for tensor in needed:
            if tensor not in tensors:
                raise self._damaged(name, KeyError(tensor))
        return tensors

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
        Settings.from_dict(manifest["settings"]).grid(Structure(**manifest["structure"]))
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = "no such folder" if not path.is_dir() else f"no readable {MANIFEST} in it ({type(error).__name__})"
        raise InputError("run", path, reason, "Give a folder that `ppf fit --output` made") from None
