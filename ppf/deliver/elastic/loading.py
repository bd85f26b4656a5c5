"""``ppf.load``: a checkpoint as the model it is, or a run as a model of any size."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from ... import checkpoint
from ...errors import InputError
from ...families import family_of
from ...fast.permute import take_permuted
from ...fitting.run import Run
from ...fitting.session import Session
from ...model.policy import Policy
from ...model.stream import Placement
from .model import elastic_class, elastic_model


def load(
    path: str | Path, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto", *, elastic: bool = False,
    refit: bool = True,
) -> PreTrainedModel:  # fmt: skip
    """A model in eval mode: of a checkpoint that PPF or Hugging Face wrote, or, ``elastic``, of a run of ``ppf fit``.

    An elastic model starts dense and changes its size in place (:class:`ppf.deliver.elastic.model.Elastic`); it holds
    the dense weights and, unless ``refit`` is False, the run's library (see docs/runtime.md for the sizes). Checkpoints
    are checked as :func:`ppf.checkpoint.load` says. Raises ``InputError`` for what is not there, damaged or unfinished,
    and for an elastic model of a family whose projections are fused.
    """
    if elastic:
        return _elastic(Run(path), device, dtype, refit)
    if (Path(path) / "run.json").is_file():
        raise InputError("path", path, "is a run, not a checkpoint", "Add elastic=True, or prune it to a checkpoint")
    return checkpoint.load(path, device, dtype)


def _elastic(run: Run, device: str | torch.device, dtype: str | torch.dtype, refit: bool) -> PreTrainedModel:
    run.require_complete()
    run.require_model()
    elastic_class(family_of(checkpoint.read_config(run.model_path).model_type))  # refused before any weight is read
    decoder = take_permuted([checkpoint.load_decoder(run.model_path, device, dtype, Placement("gpu"))], run.ranking)
    session = Session(run, device, decoder)
    session.permuted = decoder  # the library's dense weights are the model's: nothing is held twice
    library = session.library if refit else None
    model = elastic_model(decoder, session.generation_config)
    model.config._name_or_path = str(run.path)
    model.attach(run.grid, decoder, library, lambda ratio: run.policy(ratio).policy, _percents(run))
    return model


def _percents(run: Run) -> dict[float, Policy]:
    """The run's policies for all whole percents that the structure can give."""
    ratios = [percent / 100 for percent in range(1, 100) if percent / 100 <= run.grid.maximum_ratio]
    return dict(zip(ratios, run.policies(ratios), strict=True))
