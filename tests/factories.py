"""Tiny random models of any family, a byte-level tokenizer and texts: what the tests of the pipeline run on."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ppf.choose.candidates.breeding import Effort
from ppf.choose.predictor.training import fit_predictor
from ppf.families import family_of
from ppf.fitting import calibration, collection, retrained, stages
from ppf.fitting.experience import Evaluation
from ppf.fitting.run.manifest import read_manifest, write_manifest
from ppf.model.build import build, expected_tensors
from ppf.model.classes import stock_classes
from ppf.model.decoder import Decoder
from ppf.model.grid import Grid
from ppf.model.layer import LayerRanking
from ppf.model.policy import Policy
from ppf.model.structure import Structure, SubLayer

TINY = Path(__file__).parents[1] / "ppf" / "data" / "tiny-2m"
VOCABULARY = 258  # 256 bytes, begin and end

# kv heads of the model with six query heads: multi-head and grouped-query.
KV_HEADS = {"mha": 6, "gqa": 3}

# What makes a tiny model of a family show what the family is about, in texts of a few dozen tokens.
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
_SPECIAL = {
    "mistral": {"sliding_window": 16},
    "ministral3": {"sliding_window": 16, "rope_parameters": _YARN},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 12},
    "gemma3_text": {
        "sliding_window": 16, "query_pre_attn_scalar": 12, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "granite": {
        "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 4.0, "embedding_multiplier": 3.0,
    },
}  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small run several times slower when threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(family: str, heads: str = "gqa", **changes) -> PreTrainedConfig:
    """The configuration of a tiny model of a family, by its model type."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": KV_HEADS[heads],
        "max_position_embeddings": 128,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "tie_word_embeddings": False,
    }
    fields |= _SPECIAL.get(family, {}) | changes
    if family != "llama":  # others have sizes of published models where nothing is said
        fields = {"head_dim": fields["hidden_size"] // fields["num_attention_heads"], "pad_token_id": 257} | fields
    return stock_classes(family_of(family))["Config"](**fields)


def llama_config(heads: str = "gqa", **changes) -> PreTrainedConfig:
    return config_of("llama", heads, **changes)


def llama(config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of ``config``, whatever its family, whose logits are far apart: weights of size 0.2 instead of 0.02, and
    norms that are not all one.

    Channels have different sizes and share a common part, so that rankings and refits have something to find.
    """
    generator = torch.Generator().manual_seed(seed)
    one = 0 if "one-plus norm" in family_of(config.model_type).traits else 1
    state = {}
    for name, shape in expected_tensors(config).items():
        weight = torch.randn(shape, generator=generator) * 0.2
        if "norm" in name:
            weight = one + weight
        elif name.endswith(("up_proj.weight", "v_proj.weight")):
            common = torch.randn((4, shape[1]), generator=generator) * 0.2
            weight = (weight + torch.randn((shape[0], 4), generator=generator) @ common) * torch.rand(
                (shape[0], 1), generator=generator
            )
        state[name] = weight
    return build(config, state, dtype)


def model_of(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> PreTrainedModel:
    """A tiny random model of a family, by its model type; ``changes`` as for :func:`config_of`."""
    return llama(config_of(family, **changes), seed, dtype)


def tokens(batch: int = 3, length: int = 24, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_ranking(structure: Structure, seed: int = 0) -> list[LayerRanking]:
    """Units that only go together stay where they are, as in every ranking."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(sublayer: SubLayer) -> Tensor:
        order = torch.randperm(sublayer.units, generator=generator)
        return order if sublayer.step == 1 else order.sort().values

    return [LayerRanking(drawn(a), drawn(f)) for a, f in zip(structure.attention, structure.ffn, strict=True)]


def dense_weights(heads: str = "gqa", family: str = "llama", **changes) -> tuple[PreTrainedModel, Decoder]:
    model = model_of(family, heads=heads, **changes)
    return model, Decoder.of_model(model)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_checkpoint(
    path: Path, heads: str = "gqa", seed: int = 0, dtype=torch.float32, family: str = "llama", **changes
) -> Path:
    """A dense checkpoint with its tokenizer in the folder ``path``."""
    model_of(family, seed, dtype, heads=heads, **changes).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def write_text(path: Path, words: int = 900, seed: int = 0) -> Path:
    """About five bytes a word."""
    draw, vocabulary = random.Random(seed), ["the", "river", "ran", "past", "old", "stone", "walls", "at", "dawn"]
    path.write_text(" ".join(draw.choice(vocabulary) for _ in range(words)))
    return path


def rewrite_manifest(run: Path, **changes) -> None:
    """Change what a run says of itself, checksum included: as if the fit had said so."""
    write_manifest(run, read_manifest(run) | changes)


def quick_learning(patch: pytest.MonkeyPatch) -> None:
    """Train predictors and agents of the fit loop for a few steps only: tests of the loop need no good ones."""
    learn, quick = collection.learn, {"effort": 0.05, "experts": 0}
    for module in (collection, stages):
        patch.setattr(module, "learn", lambda *arguments, **named: learn(*arguments, **(named | quick)))
    predictor = retrained.learn_predictor
    patch.setattr(retrained, "learn_predictor", lambda *arguments: predictor(*arguments[:4], 0.05, *arguments[5:]))
    patch.setattr("ppf.lab.report.learning.fit_predictor", partial(fit_predictor, steps=40))
    patch.setattr("ppf.fitting.search.exploration._EFFORT", Effort(generations=3, offspring=8, keep=4))


def synthetic_log_perplexity(grid: Grid, levels: Tensor) -> Tensor:
    """A made-up log-perplexity fp32 [P] of levels [P, S]: damage of every sub-layer, products of neighbours, and growth
    with the total. Sub-layers differ up to sevenfold in what they lose."""
    lost = 1 - levels / torch.tensor(grid.top)
    weight = 0.3 + 2 * torch.rand(grid.sublayers, generator=torch.Generator().manual_seed(7))
    damage = (weight * lost.square()).sum(-1) / grid.sublayers
    pairs = (lost[:, :-1] * lost[:, 1:]).mean(-1)
    return 3.5 + damage + 1.5 * pairs + damage * pairs


def synthetic_rows(grid: Grid, levels: Tensor) -> list[Evaluation]:
    values = synthetic_log_perplexity(grid, levels).tolist()
    policies: Sequence[Policy] = grid.decode(levels)
    return [Evaluation(p, v, grid.ratio(p), 0, "random", 0.0) for p, v in zip(policies, values, strict=True)]


def track_grams(monkeypatch):
    """A function that counts the Grams alive; its ``peak`` is the most there were when one was made."""
    references = []

    def living() -> int:
        return sum(reference() is not None for reference in references)

    class Tracked(calibration._Accumulator):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            references.append(weakref.ref(self.gram))
            living.peak = max(living.peak, living())

    living.peak = 0
    monkeypatch.setattr(calibration, "_Accumulator", Tracked)
    return living
