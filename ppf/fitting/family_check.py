"""Nobody believes a family file: its declaration is compared with transformers itself, unit by unit.

On a tiny random model of the family, removing a unit must equal zeroing its columns of the output projection in the
stock model: in masked evaluation (by transformers' layers and by whatever path the evaluator takes), materialised,
saved and reloaded in a new process, and in generation with a cache. A row too many, a bias forgotten, a wrong block all
show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import InputError, PPFError
from ..families import KINDS, Family, families, registered
from ..fast.losses import logits
from ..fast.permute import permuted
from ..fast.sublayers import ByReference
from ..model.build import build, expected_tensors
from ..model.classes import announce, stock_classes
from ..model.decoder import Decoder
from ..model.grid import Grid
from ..model.layer import LayerRanking
from ..model.policy import Policy
from .evaluation import Evaluator
from .materialize import materialize

TOLERANCE = 1e-5
"""Largest difference of logits, as a share of the largest logit, in fp32."""
_LENGTH, _NEW = 12, 6
_TINY = {
    "vocab_size": 64, "hidden_size": 24, "intermediate_size": 10, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
# What is switched on where a configuration has it: windows shorter than the text, and all that is off by default.
_IF_THERE = {"sliding_window": 5, "use_sliding_window": True, "attention_bias": True, "mlp_bias": True}
_RELOAD = """
import json, sys, torch, ppf
from ppf.families import Family, Part
torch.set_num_threads(1)
ppf.families.register(eval(sys.argv[3]))
from transformers import AutoModelForCausalLM
ids, found = torch.tensor(json.loads(sys.argv[1])), {}
for folder in json.loads(sys.argv[2]):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if model.config._attn_implementation != "eager" and getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        found[folder] = model(ids).logits.tolist()
print(json.dumps(found))
"""


@dataclass(frozen=True)
class _Removal:
    """Some units of one sub-layer gone: the ranking that puts them last, and the policy that leaves them out."""

    kind: str
    layer: int
    units: tuple[int, ...]
    ranking: list[LayerRanking]
    policy: Policy

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.kind} units {list(self.units)}"


def check(family: Family, **fields: Any) -> int:
    """Compare ``family``'s declaration with transformers on a tiny random model; returns the number of removals tried.

    ``family`` need not be registered. ``fields`` change the tiny model's configuration. Raises ``PPFError`` that says
    which unit differs, where and by how much, or what of the declaration transformers refuses.
    """
    try:
        with registered(family):
            return _compare_or_explain(family, tiny_config(family, **fields))
    finally:
        for known in families():
            if known.model_type == family.model_type:
                announce(known)


def _compare_or_explain(family: Family, config: PreTrainedConfig) -> int:
    try:
        return _compare(family, config)
    except (InputError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        raise PPFError(f"family {family.model_type}: its declaration does not fit transformers: {error}") from error


def _compare(family: Family, config: PreTrainedConfig) -> int:
    stock = random_model(config, family)
    decoder, ids = Decoder.of_model(stock), torch.arange(3, 3 + 2 * _LENGTH).view(2, _LENGTH) % config.vocab_size
    grid, removals = Grid(decoder.structure, 1), list(_removals(decoder))
    with tempfile.TemporaryDirectory(prefix="ppf-check-") as folder:
        saved: dict[str, tuple[_Removal, Tensor]] = {}
        for number, removal in enumerate(removals):
            with _zeroed(stock, decoder, removal), torch.no_grad():
                expected, tokens = stock(ids).logits, _continued(stock, ids)
            model = materialize(decoder, removal.ranking, grid, removal.policy)
            _masked(family, decoder, grid, removal, ids, expected)
            _materialised(family, model, removal, ids, expected, tokens)
            model.save_pretrained(f"{folder}/{number}")
            saved[f"{folder}/{number}"] = removal, expected
        _reloaded(family, saved, ids)
    return len(removals)


def tiny_config(family: Family, **fields: Any) -> PreTrainedConfig:
    """The configuration of a model of ``family`` that takes milliseconds, with everything switched on that it has."""
    config_class = stock_classes(family)["Config"]
    known = vars(config_class())
    given = _TINY | {name: value for name, value in _IF_THERE.items() if name in known}
    layers = fields.get("num_hidden_layers", _TINY["num_hidden_layers"])
    if "layer_types" in known and "sliding_window" in known:
        types = ("sliding_attention", "full_attention")
        given["layer_types"] = [types[index % 2] for index in range(layers)]
    if "no_rope_layers" in known:
        given["no_rope_layers"] = [index % 2 for index in range(layers)]
    return config_class(**(given | fields))


def random_model(config: PreTrainedConfig, family: Family, seed: int = 0) -> PreTrainedModel:
    """A model of ``config`` in fp32 whose logits are far apart."""
    generator = torch.Generator().manual_seed(seed)
    centre = 0.0 if "one-plus norm" in family.traits else 1.0
    state = {
        name: torch.randn(shape, generator=generator) * 0.3 + ("norm" in name) * centre
        for name, shape in expected_tensors(config).items()
    }
    return build(config, state, torch.float32)


def _removals(decoder: Decoder) -> Iterator[_Removal]:
    """Every unit alone, and every sub-layer that may go entirely."""
    structure = decoder.structure
    for kind in KINDS:
        for layer, sublayer in enumerate(structure.of(kind)):
            every = tuple(range(sublayer.units))
            chosen = [] if sublayer.step > 1 else [(unit,) for unit in every]
            for gone in chosen + ([] if (kind, layer) == ("attention", 0) else [every]):
                yield _removal(decoder, kind, layer, gone)


def _removal(decoder: Decoder, kind: str, layer: int, gone: tuple[int, ...]) -> _Removal:
    structure = decoder.structure
    orders = {k: [torch.arange(s.units) for s in structure.of(k)] for k in KINDS}
    left = [unit for unit in range(structure.of(kind)[layer].units) if unit not in gone]
    orders[kind][layer] = torch.tensor([*left, *gone])
    widths = {k: [s.units for s in structure.of(k)] for k in KINDS}
    widths[kind][layer] = len(left)
    ranking = [LayerRanking(**{k: orders[k][index] for k in KINDS}) for index in range(structure.layers)]
    return _Removal(kind, layer, gone, ranking, Policy(**widths))


@contextmanager
def _zeroed(stock: PreTrainedModel, decoder: Decoder, removal: _Removal) -> Iterator[None]:
    """In the block, the removed units' columns of the output projection are zero; with all gone, its bias too."""
    columns = decoder.structure.of(removal.kind)[removal.layer].columns
    part = decoder.family.parts[removal.kind]
    output = stock.get_submodule(f"model.layers.{removal.layer}.{part.output_name}")
    before = [parameter.detach().clone() for parameter in output.parameters()]
    with torch.no_grad():
        for unit in removal.units:
            output.weight[:, unit * columns : (unit + 1) * columns] = 0
        if output.bias is not None and not removal.policy[removal.kind][removal.layer]:
            output.bias.zero_()
    yield
    with torch.no_grad():
        for parameter, values in zip(output.parameters(), before, strict=True):
            parameter.copy_(values)


def _continued(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Greedy text with a cache."""
    how = {"do_sample": False, "max_new_tokens": _NEW, "min_new_tokens": _NEW}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **how)


def _masked(family: Family, decoder: Decoder, grid: Grid, removal: _Removal, ids: Tensor, expected: Tensor) -> None:
    ranked = permuted(decoder, removal.ranking)
    found = Evaluator(ranked, grid, ids).logits(removal.policy, ids)
    _require(family, removal, "masked evaluation", found, expected)
    x, told, run = ranked.frame.begin(ids), ranked.frame.context(*ids.shape), ByReference(ranked)
    with torch.no_grad():
        for index in range(decoder.structure.layers):
            for kind in KINDS:
                if width := removal.policy[kind][index]:
                    x = run(index, kind, width, None, x, told[index])
        found = logits(ranked.frame.norm(x), ranked.frame.head, ranked.frame.scale, ranked.frame.cap)
    _require(family, removal, "masked evaluation by transformers' layers", found, expected)


def _materialised(
    family: Family, model: PreTrainedModel, removal: _Removal, ids: Tensor, expected: Tensor, tokens: Tensor
) -> None:
    with torch.no_grad():
        _require(family, removal, "materialised", model(ids).logits, expected)
    if not torch.equal(_continued(model, ids), tokens):
        raise PPFError(f"family {family.model_type}: {removal}: generation with a cache gives other tokens")


def _reloaded(family: Family, saved: dict[str, tuple[_Removal, Tensor]], ids: Tensor) -> None:
    # The declaration is data: what it prints as, a new process can read.
    command = [sys.executable, "-c", _RELOAD, json.dumps(ids.tolist()), json.dumps(list(saved)), repr(family)]
    importable = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryDirectory(prefix="ppf-check-") as elsewhere:
        done = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, env=importable)
    if done.returncode:
        raise PPFError(f"family {family.model_type}: results do not open in a new process: {done.stderr[-800:]}")
    for folder, found in json.loads(done.stdout.splitlines()[-1]).items():
        removal, expected = saved[folder]
        _require(family, removal, "reloaded in a new process", torch.tensor(found), expected)


def _require(family: Family, removal: _Removal, where: str, found: Tensor, expected: Tensor) -> None:
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off <= TOLERANCE:
        raise PPFError(
            f"family {family.model_type}: {removal}: {where} differs from the stock model with these units zeroed "
            f"by {off:.1e} of the largest logit, more than {TOLERANCE:g}"
        )
