"""Checkpoints to export: tiny random models of any family, and the bundled one, cut to all kinds of widths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache, lru_cache
from pathlib import Path

import torch
from factories import TINY, config_of, llama, one_thread
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedTokenizerFast

from ppf.checkpoint import Checkpoint, load_decoder, load_tokenizer, save
from ppf.families import KINDS, families
from ppf.model.build import LAYERS, build, pruned_config
from ppf.model.policy import Policy

SAMPLE = TINY.parent / "sample.txt"
# Layers without attention, without FFN, with neither; the last one of the second is absent too.
POLICIES = {
    0.3: Policy([2, 0, 2, 2, 1, 2, 0, 2], [384, 128, 384, 0, 384, 320, 256, 320]),
    0.5: Policy([2, 0, 1, 1, 1, 1, 1, 0], [384, 0, 256, 256, 320, 384, 0, 0]),
}
UNIFORM = Policy([1] * 8, [256] * 8)
FAMILIES = [family.model_type for family in families()]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def longrope(rotated: int, original: int) -> dict:
    """Phi-3's scaling of a rotation of ``rotated`` numbers beyond texts of ``original`` tokens."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": original,
        "short_factor": [1 + pair / 10 for pair in range(rotated // 2)],
        "long_factor": [2.0 + pair for pair in range(rotated // 2)],
    }


def uneven(family: str) -> Policy:
    """Layers of a tiny model of ``family``: whole, FFN only, attention only, neither (and last)."""
    groups = 3 if _is_whole(family) else 1
    return Policy([3, 0, groups, 0], [40, 64, 0, 0])


def even(family: str, groups: int = 2) -> Policy:
    """The same widths in all layers; ``groups`` kv-groups of three where they can go one by one."""
    return Policy([3 if _is_whole(family) else groups] * 4, [40] * 4)


def _is_whole(family: str) -> bool:
    return next(f for f in families() if f.model_type == family).attention.whole


def prune_to(output: Path, policy: Policy, model: Path = TINY) -> Path:
    """The first units of ``model``, as many as ``policy`` says, as a checkpoint."""
    decoder, state = load_decoder(model), {}
    for index, layer in enumerate(decoder.layers):
        names = decoder.names(index)
        for kind in KINDS:
            kept = names.prefix(layer, kind, policy[kind][index])
            state |= {f"{LAYERS}{index}.{name}": tensor.contiguous() for name, tensor in kept.items()}
    pruned = build(pruned_config(decoder.config, policy), state | dict(decoder.outer), decoder.dtype)
    save(pruned, load_tokenizer(model), output, {"policy": policy.to_dict()})
    return output


def policy_with_zeros(model: Path, ratio: float) -> Policy:
    """A policy of about ``ratio`` that removes an attention and an FFN altogether."""
    structure = load_decoder(model).structure
    kept = round(structure.ffn[0].units * (1 - ratio) / 64) * 64
    groups, channels = [structure.attention[0].units] * structure.layers, [kept] * structure.layers
    groups[1] = channels[2] = groups[-1] = channels[-1] = 0
    return Policy(groups, channels)


def write_random(output: Path, policy: Policy | None = None, tokenizer=None, family: str = "llama", **changes) -> Path:
    """A random model of :func:`factories.config_of`, pruned to ``policy`` if given; quick, and of odd widths.

    Its vocabulary of 300 is larger than the tokenizer's 290.
    """
    fields = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1} | changes
    config = config_of(family, **({"pad_token_id": fields["vocab_size"] - 1} | fields))
    model = llama(pruned_config(config, policy) if policy else config)
    save(model, tokenizer or bpe_tokenizer(), output, {})
    return output


def bpe_tokenizer(pre_tokenizer: dict | None = None, **model) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 290 tokens, trained on the sample; ``model`` changes fields of tokenizer.json's model."""
    data = json.loads(_trained())
    data["model"] |= model
    data["pre_tokenizer"] = pre_tokenizer or data["pre_tokenizer"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<s>", eos_token="</s>"
    )


def write_tower(output: Path, policy: Policy) -> Path:
    """A random Gemma 3 with a vision tower, its text tower cut to ``policy``."""
    fields = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": True}
    text = config_of("gemma3_text", **fields)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text.to_dict(), vision_config=vision | {"image_size": 16, "patch_size": 4}, image_token_index=299,
        boi_token_index=298, eoi_token_index=297, mm_tokens_per_image=4,
    )  # fmt: skip
    dense = output.with_name(f"{output.name}-dense")
    Gemma3ForConditionalGeneration(config).save_pretrained(dense)
    bpe_tokenizer().save_pretrained(dense)
    save(llama(pruned_config(text, policy)), None, output, {}, source=Checkpoint(dense))
    return output


@cache
def _trained() -> str:
    """tokenizer.json of :func:`bpe_tokenizer`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SAMPLE.read_text(encoding="utf-8")[:20_000]], trainer)
    return tokenizer.to_str()


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


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """:func:`sentencepiece_tokenizer` as Gemma's is: no space in front, and a step that finds no spaces any more."""
    tokenizer = sentencepiece_tokenizer()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    space = {"String": " "}
    data["normalizer"] = {"type": "Replace", "pattern": space, "content": "▁"}
    data["pre_tokenizer"] = {"type": "Split", "pattern": space, "behavior": "MergedWithPrevious", "invert": False}
    data["decoder"]["decoders"] = data["decoder"]["decoders"][:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _splits(piece: str, vocabulary: dict[str, int]) -> list[list[str]]:
    pairs = ([piece[:cut], piece[cut:]] for cut in range(1, len(piece)))
    return [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]


def _added(index: int, token: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, "special": True} | flags


def sample_ids(checkpoint: Path, tokens: int = 96) -> list[int]:
    """The begin token and some text, in the checkpoint's tokens."""
    return load_tokenizer(checkpoint)(SAMPLE.read_text(encoding="utf-8")[40_000:42_000])["input_ids"][:tokens]


def transformers_logits(checkpoint: Path, ids: list[int]) -> Tensor:
    """fp32 logits [T, vocabulary] of the checkpoint in transformers; do not change them."""
    return _logits(checkpoint, tuple(ids))


@lru_cache(maxsize=4)
@torch.no_grad()
def _logits(checkpoint: Path, ids: tuple[int, ...]) -> Tensor:
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
