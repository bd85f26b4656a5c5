"""llama.cpp's graphs written out in NumPy, fp64, from nothing but a GGUF file: quirks included.

Independent of the writer, read off llama.cpp's src/models: ``llama`` and its kin rotate neighbouring rows, the others
rows half a head apart; a ``deci`` layer whose FFN width is 0 is skipped whole, and after the last layer's attention
only the rows that are asked for remain, unless that layer was skipped; windows exist in Gemma's graphs only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize

_HALVES = {"qwen2", "qwen3", "openelm", "gemma2", "gemma3", "phi3", "olmo2"}
_WINDOWS = {"gemma2": 2, "gemma3": 6}


class Reference:
    """One GGUF file: ``fields`` and ``tensors`` (dequantised, [rows, columns]) as they stand in it.

    ``context`` is what llama.cpp is opened with: it decides between the long and the short factors of a rotation.
    """

    def __init__(self, path: Path, context: int = 0):
        reader = GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(tensor.shape[::-1])
            for tensor in reader.tensors
        }
        self.architecture, self.context = self.fields["general.architecture"], context
        self.gemma = self.architecture.startswith("gemma")

    def field(self, name: str, default: Any = None) -> Any:
        value = self.fields.get(f"{self.architecture}.{name}", default)
        assert value is not None, name
        return value

    def widths(self) -> list[tuple[int, int, int]]:
        """(query heads, kv heads, FFN width) of every layer."""
        names, layers = ("attention.head_count", "attention.head_count_kv", "feed_forward_length"), []
        for index in range(self.field("block_count")):
            values = (self.field(name) for name in names)
            layers.append(tuple(v[index] if isinstance(v, list) else v for v in values))
        return layers

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits [vocabulary] after the last token of ``ids``, which is all that is asked for."""
        embedding, widths = self.tensors["token_embd.weight"], self.widths()
        x = embedding[ids] * (np.sqrt(embedding.shape[1]) if self.gemma else self.field("embedding_scale", 1.0))
        residual = self.field("residual_scale", 1.0)
        for index, (heads, kv_heads, channels) in enumerate(widths):
            y = x + residual * self._attend(x, index, heads, kv_heads) if heads else x
            if index == len(widths) - 1:
                y = y[-1:]
            if channels:
                x = y + residual * self._feed(y, index)
        # Rows nobody picked are all output, and the first one is taken for the one that was asked for.
        logits = self._norm(x, "output_norm")[0] @ self.tensors.get("output.weight", embedding).T
        logits = logits / self.field("logit_scale", 1.0)
        default = {"gemma2": 30.0}.get(self.architecture, 0.0)
        return _capped(logits, self.field("final_logit_softcapping", default) if self.gemma else 0.0)

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """Root mean square norm over the last dimension, if the file has it."""
        if f"{name}.weight" not in self.tensors:
            return x
        scale = np.sqrt(np.square(x).mean(-1, keepdims=True) + self.field("attention.layer_norm_rms_epsilon"))
        return x / scale * self.tensors[f"{name}.weight"]

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(f"{name}.bias", 0)

    def _project(self, y: np.ndarray, index: int, heads: int, kv_heads: int) -> list[np.ndarray]:
        """Queries, keys and values [T, heads, d], queries and keys normalised."""
        block, width = f"blk.{index}.", self.field("attention.key_length")
        if f"{block}attn_qkv.weight" in self.tensors:
            sizes = np.cumsum([heads * width, kv_heads * width])
            parts = np.split(self._linear(y, f"{block}attn_qkv"), sizes, axis=-1)
        else:
            parts = [self._linear(y, f"{block}attn_{role}") for role in "qkv"]
        joint, split = self.architecture == "olmo2", []
        for role, part in zip("qkv", parts, strict=True):
            part = self._norm(part, f"{block}attn_{role}_norm") if joint else part
            part = part.reshape(len(y), -1, width)
            split.append(part if joint else self._norm(part, f"{block}attn_{role}_norm"))
        return split

    def _attend(self, x: np.ndarray, index: int, heads: int, kv_heads: int) -> np.ndarray:
        block, count = f"blk.{index}.", len(x)
        q, k, v = self._project(self._norm(x, f"{block}attn_norm"), index, heads, kv_heads)
        local = self._is_local(index)
        if self.architecture != "smollm3" or (index + 1) % 4:
            q, k = self._rotate(q, local), self._rotate(k, local)
        q = q * self._temperature(count)[:, None, None]
        k, v = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, v))
        score = np.einsum("ihd,jhd->hij", q, k) * self._scale(heads)
        if self.architecture == "gemma2":
            score = _capped(score, self.field("attn_logit_softcapping", 50.0))
        past = np.arange(count)[:, None] - np.arange(count)
        score[:, (past < 0) | (local & (past >= self.field("attention.sliding_window", 4096)))] = -np.inf
        weight = np.exp(score - score.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", weight / weight.sum(-1, keepdims=True), v).reshape(count, -1)
        return self._norm(self._linear(mixed, f"{block}attn_output"), f"{block}post_attention_norm")

    def _is_local(self, index: int) -> bool:
        step = _WINDOWS.get(self.architecture)
        if step is None or (self.architecture == "gemma3" and "gemma3.attention.sliding_window" not in self.fields):
            return False
        pattern = self.fields.get(f"{self.architecture}.attention.sliding_window_pattern")
        return bool(pattern[index]) if pattern else (index + 1) % step != 0

    def _scale(self, heads: int) -> float:
        usual = 1 / np.sqrt(self.field("attention.key_length"))
        return self.field("attention.scale") if self.architecture == "granite" else usual

    def _temperature(self, count: int) -> np.ndarray:
        """What queries are multiplied by, [T]."""
        if self.architecture != "mistral3":
            return np.ones(count)
        block = np.floor(np.arange(count) / self.field("rope.scaling.original_context_length"))
        return 1 + self.field("attention.temperature_scale") * np.log(1 + block)

    def _rotate(self, x: np.ndarray, local: bool) -> np.ndarray:
        """[T, heads, d]: rows 2j and 2j + 1 of a head are one complex number, or rows j and j + d/2."""
        rotated = self.field("rope.dimension_count")
        frequency, stretch = self._frequencies(rotated, local)
        turn = stretch * np.exp(1j * np.arange(len(x))[:, None, None] * frequency)
        half = rotated // 2
        pairs = (x[..., :half], x[..., half:rotated]) if self.architecture in _HALVES else (x[..., 0::2], x[..., 1::2])
        turned = (pairs[0] + 1j * pairs[1]) * turn
        if self.architecture in _HALVES:
            return np.concatenate((turned.real, turned.imag, x[..., rotated:]), -1)
        return np.stack((turned.real, turned.imag), -1).reshape(x.shape)

    def _frequencies(self, rotated: int, local: bool) -> tuple[np.ndarray, float]:
        """Radians a token [rotated/2], and what cosines and sines are multiplied by."""
        base = self.field("rope.freq_base")
        if local and self.architecture == "gemma3":
            return self.field("rope.freq_base_swa", 10000.0) ** -(np.arange(0, rotated, 2) / rotated), 1.0
        frequency = base ** -(np.arange(0, rotated, 2) / rotated)
        kind = self.field("rope.scaling.type", "none")
        if kind == "longrope":
            long = self.context > self.field("rope.scaling.original_context_length")
            return frequency / self.tensors[f"rope_factors_{'long' if long else 'short'}.weight"], 1.0
        frequency = frequency / self.tensors.get("rope_freqs.weight", 1)
        factor = self.field("rope.scaling.factor", 1.0)
        if kind != "yarn":
            return frequency / factor, 1.0
        original = self.field("rope.scaling.original_context_length")
        ends = [rotated * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(base)) for turns in (32, 1)]
        low, high = max(0, np.floor(ends[0])), min(rotated - 1, np.ceil(ends[1]))
        ramp = 1 - np.clip((np.arange(rotated // 2) - low) / max(0.001, high - low), 0, 1)
        return frequency / factor * (1 - ramp) + frequency * ramp, 1 + 0.1 * np.log(factor)

    def _feed(self, x: np.ndarray, index: int) -> np.ndarray:
        block = f"blk.{index}."
        y = self._norm(x, f"{block}ffn_norm")
        up = self._linear(y, f"{block}ffn_up")
        gate, up = np.split(up, 2, -1) if self.architecture == "phi3" else (self._linear(y, f"{block}ffn_gate"), up)
        mixed = (_gelu(gate) if self.gemma else gate / (1 + np.exp(-gate))) * up
        return self._norm(self._linear(mixed, f"{block}ffn_down"), f"{block}post_ffw_norm")


def _capped(x: np.ndarray, cap: float) -> np.ndarray:
    return cap * np.tanh(x / cap) if cap else x


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
