"""Tiny random models of every family, dense and pruned, and what is asked of them as transformers models."""

from pathlib import Path

import pytest
import torch
from torch.func import functional_call

from ppf.families import KINDS, Family, families, family_of
from ppf.fast.permute import identity
from ppf.fitting.family_check import random_model, tiny_config
from ppf.fitting.materialize import materialize
from ppf.model.build import build, pruned_config
from ppf.model.classes import result_classes
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.policy import Policy

TINY = Path(__file__).parents[1] / "ppf" / "data" / "tiny-2m"
ALL = families()
BY_TYPE = {family.model_type: family for family in ALL}
LLAMA = BY_TYPE["llama"]
every_family = pytest.mark.parametrize("family", ALL, ids=list(BY_TYPE))
# Newer releases of transformers call them otherwise; the older names serve all that PPF supports.
old_names = pytest.mark.filterwarnings("ignore:`(past_key_values|gradient_checkpointing_enable)` is deprecated")
# Layers: dense, no attention, no FFN, neither, partly both, one kv-group. Every second one is global in families that
# have windows, so that the first global layers are those without attention.
FFN = [10, 4, 0, 0, 7, 1]
POLICY = Policy([3, 0, 2, 0, 1, 1], FFN)
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0],
    },
}  # fmt: skip


def policy_for(family: Family) -> Policy:
    """:data:`POLICY`, or where attention goes as a whole the nearest to it."""
    return Policy([3, 0, 3, 0, 3, 3], FFN) if family.attention.whole else POLICY


def dense_config(family: Family = LLAMA, **changes):
    return tiny_config(family, **({"num_hidden_layers": 6} | changes))


def pruned_model(family: Family = LLAMA, policy: Policy | None = None, dtype=torch.float32, **changes):
    return model_in(dtype, pruned_config(dense_config(family, **changes), policy or policy_for(family)))


def model_in(dtype: torch.dtype, config):
    """A random model in another dtype than fp32, built in it: rotary frequencies stay fp32."""
    model = random_model(config, family_of(config.model_type))
    return model if dtype is torch.float32 else build(config, model.state_dict(), dtype)


def per_layer(dense, layers: dict[int, dict[str, int]] | None = None):
    """``dense`` under the class whose layers may differ, with these differences."""
    fields = {k: v for k, v in dense.to_dict().items() if k not in ("model_type", "architectures")}
    return result_classes(family_of(dense.model_type))["Config"](**fields, per_layer_config=layers or {})


def tokens(batch: int = 2, length: int = 11, vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def greedy(model, ids: torch.Tensor, **options) -> torch.Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    how = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12, "disable_compile": True}
    return model.generate(ids, attention_mask=mask, **(how | options))[:, ids.shape[1] :]


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return outputs(model, ids).logits


@torch.no_grad()
def outputs(model, ids: torch.Tensor):
    """What the model gives with its weights where torch would have put them: a product's last bit may depend on how its
    operands are aligned, and those of a mapped file lie anyhow."""
    return functional_call(model, {name: p.clone() for name, p in model.named_parameters()}, (ids,))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one, as a share of the largest number expected."""
    return float((found - expected).abs().max() / expected.abs().max())


def dense_and_pruned(family: Family, **changes):
    """A stock model with the columns of what goes set to zero (and the output biases of what goes entirely), and the
    result that has these units no more."""
    config, policy = dense_config(family, **changes), policy_for(family)
    stock = random_model(config, family)
    decoder = Decoder.of_model(stock)
    pruned = materialize(decoder, identity(decoder), Grid(decoder.structure, 1), policy)
    return zeroed(stock, policy), pruned


@torch.no_grad()
def zeroed(stock, policy: Policy):
    """A copy of a stock model that computes what ``policy`` leaves of it."""
    decoder, state = Decoder.of_model(stock), {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    for kind in KINDS:
        for index, (width, sublayer) in enumerate(zip(policy[kind], decoder.structure.of(kind), strict=True)):
            name = f"model.layers.{index}.{decoder.family.parts[kind].output_name}"
            state[f"{name}.weight"][:, width * sublayer.columns :] = 0
            if not width and f"{name}.bias" in state:
                state[f"{name}.bias"].zero_()
    return build(stock.config, state, torch.float32)
