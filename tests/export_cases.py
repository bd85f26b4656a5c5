"""Pruned checkpoints to export: real models, calibrated and refitted, with absent sub-layers of every kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from factories import TINY, llama, llama_config, one_thread
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ppf.checkpoint import load_dense, load_tokenizer, save
from ppf.choose.candidates.sampling import random_levels
from ppf.fitting.calibration import calibrate
from ppf.fitting.library import Library, refit_layer
from ppf.fitting.materialise import materialize
from ppf.fitting.ranking import rank_layer
from ppf.model import pruned_config
from ppf.model.grid import Grid
from ppf.model.policy import Policy
from ppf.model.weights import DecoderWeights, permute_layer
from ppf.text import pack, read_tokens

SAMPLE = TINY.parent / "sample.txt"
# Layers without attention, without FFN, with neither; the last one of the second is absent too.
POLICIES = {
    0.3: Policy([2, 0, 2, 2, 1, 2, 0, 2], [384, 128, 384, 0, 384, 320, 256, 320]),
    0.5: Policy([2, 0, 1, 1, 1, 1, 1, 0], [384, 0, 256, 256, 320, 384, 0, 0]),
}
UNIFORM = Policy([1] * 8, [256] * 8)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def prune_to(output: Path, policy: Policy, model: Path = TINY, text: Path = SAMPLE, sequences: int = 12) -> Path:
    """``model`` pruned to ``policy``, ranked and refitted on the start of ``text``, as a checkpoint."""
    with one_thread(), torch.no_grad():
        dense, tokenizer = load_dense(model), load_tokenizer(model)
        weights, ids = DecoderWeights.from_model(dense), pack(read_tokens(text, tokenizer)[:16_384], 256)[:sequences]
        grid, ranking, refits = Grid(weights.structure, 64), [], []
        for layer, statistics in zip(weights.layers, calibrate(weights.to(torch.float32), ids), strict=True):
            ranking.append(rank_layer("wanda-sp", layer, statistics, weights.structure))
            refits.append(
                refit_layer(permute_layer(layer, ranking[-1], weights.structure), statistics, ranking[-1], grid)
            )
        library = Library([a for a, _ in refits] + [f for _, f in refits])
        pruned = materialize(dense.config, weights, ranking, grid, policy, library)
        save(pruned, tokenizer, output, {"policy": {"attention": policy.attention, "ffn": policy.ffn}})
    return output


def policy_with_zeros(model: Path, ratio: float) -> Policy:
    """A random policy of ``ratio`` that removes an attention and an FFN altogether."""
    grid, generator = Grid(DecoderWeights.from_model(load_dense(model)).structure, 64), torch.Generator().manual_seed(0)
    drawn = grid.decode(random_levels(grid, torch.full((512,), ratio), generator))
    return next(policy for policy in drawn if 0 in policy.attention and 0 in policy.ffn)


def write_random(output: Path, policy: Policy | None = None, tokenizer=None, **changes) -> Path:
    """A random Llama of :func:`factories.llama_config`, pruned to ``policy`` if given; quick, and of odd widths.

    Its vocabulary of 300 is larger than the tokenizer's 290.
    """
    config = llama_config(**({"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1} | changes))
    model = llama(pruned_config(config, policy) if policy else config)
    save(model, tokenizer or bpe_tokenizer(), output, {})
    return output


def bpe_tokenizer(pre_tokenizer: dict | None = None, **model) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 290 tokens, trained on the sample; ``model`` changes fields of tokenizer.json's model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE.read_text(encoding="utf-8")[:20_000]], trainer)
    return _adapted(tokenizer, pre_tokenizer, model)


def sentencepiece_tokenizer(metaspace: bool = False, size: int = 480) -> PreTrainedTokenizerFast:
    """BPE with byte fallback as transformers writes SentencePiece's: all pairs that join to a piece are merges.

    Spaces are written by normalisers, as in Llama 2's own tokenizer.json, or by the Metaspace pre-tokeniser.
    """
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Trained on words: SentencePiece's pieces do not cross them either.
    words = [f"▁{word}" for word in SAMPLE.read_text(encoding="utf-8")[:20_000].split()]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    untouched = Tokenizer(models.BPE(unk_token="<unk>"))
    untouched.train_from_iterator(words, trainer)
    pieces = json.loads(untouched.to_str())["model"]
    data, vocabulary = json.loads(tokenizer.to_str()), pieces["vocab"]
    made = dict.fromkeys(left + right for left, right in pieces["merges"])
    data["model"] |= {"vocab": vocabulary, "merges": [pair for piece in made for pair in _splits(piece, vocabulary)]}
    data["added_tokens"] = [_added(index, token) for index, token in enumerate(special[:3])]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _splits(piece: str, vocabulary: dict[str, int]) -> list[list[str]]:
    pairs = ([piece[:cut], piece[cut:]] for cut in range(1, len(piece)))
    return [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]


def _added(index: int, token: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, "special": True} | flags


def _adapted(tokenizer: Tokenizer, pre_tokenizer: dict | None, model: dict) -> PreTrainedTokenizerFast:
    data = json.loads(tokenizer.to_str())
    data["model"] |= model
    data["pre_tokenizer"] = pre_tokenizer or data["pre_tokenizer"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<s>", eos_token="</s>"
    )


def sample_ids(checkpoint: Path, tokens: int = 96) -> list[int]:
    """The begin token and some text, in the checkpoint's tokens."""
    return load_tokenizer(checkpoint)(SAMPLE.read_text(encoding="utf-8")[40_000:42_000])["input_ids"][:tokens]


@torch.no_grad()
def transformers_logits(checkpoint: Path, ids: list[int]) -> Tensor:
    """fp32 logits [T, vocabulary] of the checkpoint in transformers."""
    with one_thread():
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(torch.tensor([ids])).logits[0]


@torch.no_grad()
def transformers_greedy(checkpoint: Path, ids: list[int], new: int = 64) -> list[int]:
    """The next ``new`` tokens, always the likeliest; the end token does not stop it."""
    with one_thread():
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        prompt = torch.tensor([ids])
        # Without a mask, generate() would take a begin token of id 0 for padding.
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new)
    return out[0, len(ids) :].tolist()


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new process, in a folder where the source tree cannot be imported by accident, and without ppf_autoload."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} | environment
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=120)
