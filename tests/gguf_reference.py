"""llama.cpp's graph of a Llama written out in NumPy, fp64, from nothing but a GGUF file: quirks included.

Independent of the writer: rope rotates neighbouring rows, a ``deci`` layer whose FFN width is 0 is skipped whole, and
after the last layer's attention only the rows that are asked for remain, unless that layer was skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize


class Reference:
    """One GGUF file: ``fields`` and ``tensors`` (dequantised, [rows, columns]) as they stand in it."""

    def __init__(self, path: Path):
        reader = GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        self.kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(tensor.shape[::-1])
            for tensor in reader.tensors
        }
        self.architecture = self.fields["general.architecture"]

    def field(self, name: str) -> Any:
        return self.fields[f"{self.architecture}.{name}"]

    def widths(self) -> list[tuple[int, int, int]]:
        """(query heads, kv heads, FFN width) of every layer."""
        names, layers = ("attention.head_count", "attention.head_count_kv", "feed_forward_length"), []
        for index in range(self.field("block_count")):
            values = (self.field(name) for name in names)
            layers.append(tuple(v[index] if isinstance(v, list) else v for v in values))
        return layers

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits [vocabulary] after the last token of ``ids``, which is all that is asked for."""
        x, widths = self.tensors["token_embd.weight"][ids], self.widths()
        for index, (heads, kv_heads, channels) in enumerate(widths):
            y = self._attend(x, index, heads, kv_heads) if heads else x
            if index == len(widths) - 1:
                y = y[-1:]
            if channels:
                x = y + self._feed(y, index)
        # Rows nobody picked are all output, and the first one is taken for the one that was asked for.
        return self._norm(x, "output_norm")[0] @ self.tensors.get("output.weight", self.tensors["token_embd.weight"]).T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt(np.square(x).mean(-1, keepdims=True) + self.field("attention.layer_norm_rms_epsilon"))
        return x / scale * self.tensors[f"{name}.weight"]

    def _attend(self, x: np.ndarray, index: int, heads: int, kv_heads: int) -> np.ndarray:
        y, width, count = self._norm(x, f"blk.{index}.attn_norm"), self.field("attention.key_length"), len(x)

        def project(name: str, number: int) -> np.ndarray:
            return (y @ self.tensors[f"blk.{index}.attn_{name}.weight"].T).reshape(count, number, width)

        q, k, v = self._rotate(project("q", heads)), self._rotate(project("k", kv_heads)), project("v", kv_heads)
        k, v = (np.repeat(t, heads // kv_heads, axis=1) for t in (k, v))
        score = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(width)
        score[:, np.triu(np.ones((count, count), bool), 1)] = -np.inf
        weight = np.exp(score - score.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", weight / weight.sum(-1, keepdims=True), v).reshape(count, -1)
        return x + mixed @ self.tensors[f"blk.{index}.attn_output.weight"].T

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        """[T, heads, d]: rows 2j and 2j + 1 of a head are one complex number."""
        pairs = np.arange(0, x.shape[-1], 2) / x.shape[-1]
        frequency = self.field("rope.freq_base") ** -pairs / self.tensors.get("rope_freqs.weight", 1)
        turn = np.exp(1j * np.arange(len(x))[:, None, None] * frequency)
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack((turned.real, turned.imag), -1).reshape(x.shape)

    def _feed(self, x: np.ndarray, index: int) -> np.ndarray:
        y = self._norm(x, f"blk.{index}.ffn_norm")
        gate, up = (y @ self.tensors[f"blk.{index}.ffn_{name}.weight"].T for name in ("gate", "up"))
        return (gate / (1 + np.exp(-gate)) * up) @ self.tensors[f"blk.{index}.ffn_down.weight"].T
