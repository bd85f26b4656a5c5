"""``ppf.load``: a checkpoint as the model it is, or a run as a model of any size."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from ... import checkpoint
from ...errors import InputError
from ...fitting.run import Run
from ...model import PPFLlamaConfig, build
from ...model.policy import Policy
from ...model.weights import DecoderWeights, permute_layer
from .model import ElasticLlamaForCausalLM


def load(
    path: str | Path, device: str = "cpu", dtype: str | torch.dtype = "auto", *, elastic: bool = False,
    refit: bool = True,
) -> PreTrainedModel:  # fmt: skip
    """A model in eval mode: of a checkpoint that PPF or Hugging Face wrote, or, ``elastic``, of a run of ``ppf fit``.

    An elastic model starts dense and changes its size in place (:class:`ElasticLlamaForCausalLM`); it holds the dense
    weights and, unless ``refit`` is False, the run's library (see docs/runtime.md for the sizes). Checkpoints are
    checked as :func:`ppf.checkpoint.load` says. Raises ``InputError`` for what is not there, damaged or unfinished.
    """
    if elastic:
        return _elastic(Run(path, device), dtype, refit)
    if (Path(path) / "run.json").is_file():
        raise InputError("path", path, "is a run, not a checkpoint", "Add elastic=True, or prune it to a checkpoint")
    return checkpoint.load(path, device, dtype)


def _elastic(run: Run, dtype: str | torch.dtype, refit: bool) -> ElasticLlamaForCausalLM:
    run.require_complete()
    run.require_model()
    dense = checkpoint.load_dense(run.model_path, str(run.device), dtype)
    weights = _permute(dense, run)
    # The run sees the same tensors, so that its library refers to them and nothing is held twice.
    run.weights = run.permuted = weights
    library = run.library if refit else None
    del run.weights  # they are no longer in checkpoint order, as it promises
    fields = {k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")}
    state = dense.state_dict()
    if dense.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    config = PPFLlamaConfig(**fields)
    model = build(config, state, dense.dtype, dense.generation_config, ElasticLlamaForCausalLM)
    model.config._name_or_path = str(run.path)
    model.attach(run.grid, weights, library, lambda ratio: run.policy(ratio).policy, _percents(run))
    return model


@torch.no_grad()
def _percents(run: Run) -> dict[float, Policy]:
    """The agent's policies for all whole percents that the structure can give, in one forward pass."""
    ratios = [percent / 100 for percent in range(1, 100) if percent / 100 <= run.grid.maximum_ratio]
    return dict(zip(ratios, run.grid.decode(run.agent(torch.tensor(ratios))), strict=True))


@torch.no_grad()
def _permute(dense: LlamaForCausalLM, run: Run) -> DecoderWeights:
    """The model's weights in ranking order, layer by layer in place: only one layer exists twice."""
    weights = DecoderWeights.from_model(dense)
    for layer, ranking in zip(weights.layers, run.ranking, strict=True):
        permuted = permute_layer(layer, ranking, weights.structure)
        for name, tensor in vars(permuted).items():
            getattr(layer, name).copy_(tensor)
    return weights
