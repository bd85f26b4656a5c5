"""Ops of batched evaluation: a layer of many policies' members at once; see ``ppf.kernels.members`` for the layout.

D members share N tokens (sequences of one length). Tables are int32 [D] on the activations' device and not checked: the
evaluator makes them. The kernels leave columns past a member's width undefined, the references leave zeros there.
Weights have the activations' dtype; those of norms may be fp32 instead. None stands for what a family has not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import LIBRARY

LIBRARY.define(
    "members_project(Tensor x, Tensor norm, Tensor weight, Tensor? bias, Tensor? head_norm, Tensor cos, Tensor sin, "
    "Tensor level, int length, int group_rows, float epsilon) -> Tensor"
)
LIBRARY.define(
    "members_attention(Tensor qkv, Tensor level, int length, int heads, int head_dim, float scale, int window) "
    "-> Tensor"
)
LIBRARY.define(
    "members_mix(Tensor x, Tensor inner, Tensor o, Tensor? o_bias, Tensor? after_attention, Tensor norm, "
    "Tensor gate_up, Tensor? gate_up_bias, Tensor down, Tensor? down_bias, Tensor? after_ffn, Tensor source, "
    "Tensor level_attention, Tensor level_ffn, int unit, int multiple, float epsilon, str activation) -> Tensor"
)
LIBRARY.define(
    "members_losses(Tensor x, Tensor norm, Tensor head, Tensor targets, int length, float epsilon) -> Tensor"
)

ACTIVATIONS = "silu", "gelu_pytorch_tanh"
"""The FFN activations that ``members_mix`` computes."""


def interleave_heads(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k [heads·d, …] with those that a rotation combines side by side: 0, d/2, 1, d/2+1, … of a head."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(rows.shape)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """[2C, …]: gate row 0, up row 0, gate row 1, …"""
    return torch.stack((gate, up), 1).flatten(0, 1)


def project_reference(
    x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, head_norm: Tensor | None, cos: Tensor, sin: Tensor,
    level: Tensor, length: int, group_rows: int, epsilon: float,
) -> Tensor:  # fmt: skip
    """x [D, N, H]; weight [G·(g+2)·d, H] and bias [G·(g+2)·d], q and k rows interleaved; cos, sin [length, d/2]
    -> [D, N, G·(g+2)·d]. ``head_norm`` fp32 [(g+2)·d]: of every head's norm its weight, interleaved; ones for v."""
    y = x.new_zeros(len(level), x.shape[1], len(weight))
    d = 2 * cos.shape[1]
    for member, groups in enumerate(level.tolist()):
        kept = groups * group_rows
        out = F.linear(_normed(x[member], norm, epsilon), weight[:kept], None if bias is None else bias[:kept])
        out = out.view(len(out) // length, length, groups, group_rows)
        turned, value = out[..., : group_rows - d].unflatten(-1, (-1, d)), out[..., group_rows - d :]
        if head_norm is not None:
            scale = head_norm[: group_rows - d].view(-1, d)
            turned = (F.rms_norm(turned.to(scale.dtype), (d,), None, epsilon) * scale).to(x.dtype)
        turned = _rotated(turned, cos, sin).flatten(-2).to(x.dtype)
        y[member, :, :kept] = torch.cat((turned, value), -1).reshape(x.shape[1], kept)
    return y


def attention_reference(
    qkv: Tensor, level: Tensor, length: int, heads: int, head_dim: int, scale: float, window: int
) -> Tensor:
    """Causal attention within sequences of ``length``: [D, N, G·(g+2)·d] -> [D, N, G·g·d]. A query sees ``window``
    keys, its own among them; 0 is no window."""
    members, tokens, width = qkv.shape
    groups = width // ((heads + 2) * head_dim)
    parts = qkv.view(members, -1, length, groups, heads + 2, head_dim).permute(0, 1, 3, 4, 2, 5)
    q, k, v = parts.split([heads, 1, 1], dim=3)
    ones = torch.ones(length, length, dtype=torch.bool, device=qkv.device)
    seen = ones.tril() & ones.triu(1 - (window or length))
    out = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), attn_mask=seen, scale=scale)
    out = out.permute(0, 1, 4, 2, 3, 5).reshape(members, tokens, groups, heads * head_dim)
    kept = torch.arange(groups, device=qkv.device) < level[:, None]
    return (out * kept[:, None, :, None]).flatten(2)


def mix_reference(
    x: Tensor, inner: Tensor, o: Tensor, o_bias: Tensor | None, after_attention: Tensor | None,
    norm: Tensor, gate_up: Tensor, gate_up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    after_ffn: Tensor | None, source: Tensor, level_attention: Tensor, level_ffn: Tensor, unit: int, multiple: int,
    epsilon: float, activation: str,
) -> Tensor:  # fmt: skip
    """x [E, N, H] and inner [E, N, G·g·d] -> the layer's output [D, N, H].

    o [levels, H, G·g·d] and down [levels, H, C] give every level's weight. At level 0 a sub-layer gives nothing, its
    output's bias [H] neither. ``after_attention`` and ``after_ffn`` [H] are norms of what the sub-layers give.
    """
    y = x.new_empty(len(level_ffn), *x.shape[1:])
    tables = (t.tolist() for t in (source, level_attention, level_ffn))
    for member, (origin, a, f) in enumerate(zip(*tables, strict=True)):
        y[member] = x[origin]
        if a:
            given = F.linear(inner[origin, :, : a * unit], o[a][:, : a * unit], o_bias)
            y[member] += _after(given, after_attention, epsilon)
        if width := f * multiple:
            bias = None if gate_up_bias is None else gate_up_bias[: 2 * width]
            both = F.linear(_normed(y[member], norm, epsilon), gate_up[: 2 * width], bias)
            acted = _activated(*both.unflatten(-1, (-1, 2)).unbind(-1), activation)
            y[member] += _after(F.linear(acted, down[f][:, :width], down_bias), after_ffn, epsilon)
    return y


def losses_reference(x: Tensor, norm: Tensor, head: Tensor, targets: Tensor, length: int, epsilon: float) -> Tensor:
    """Summed negative log-likelihoods fp64 [D]; the last token of every sequence predicts nothing."""
    counted = torch.arange(len(targets), device=x.device) % length != length - 1
    logits = F.linear(_normed(x[:, counted], norm, epsilon), head).float()
    target = targets[counted].expand(len(x), -1)
    return F.cross_entropy(logits.transpose(1, 2), target, reduction="none").double().sum(1)


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm in x's dtype; an fp32 weight is applied before the result is rounded."""
    return F.rms_norm(x.to(weight.dtype), weight.shape, weight, epsilon).to(x.dtype)


def _after(given: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    return given if weight is None else _normed(given, weight, epsilon)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved heads [..., length, groups, heads, d] turned by the angles of their positions."""
    first, second = heads.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[:, None, None, :], sin[:, None, None, :]
    return torch.stack((first * c - second * s, second * c + first * s), -1).flatten(-2)


def _activated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def _kernel(name: str):
    def call(*arguments):
        from ppf.kernels import members

        return getattr(members, name)(*arguments)

    return call


def _fake_project(x, norm, weight, bias, head_norm, cos, sin, level, *_):
    return x.new_empty(len(level), x.shape[1], len(weight))


def _fake_attention(qkv, level, length, heads, *_):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // (heads + 2) * heads)


def _fake_mix(x, *others):
    level_ffn = others[12]
    return x.new_empty(len(level_ffn), *x.shape[1:])


def _fake_losses(x, norm, head, targets, length, epsilon):
    return x.new_empty(len(x), dtype=torch.float64)


for _name, _reference, _fake in (
    ("project", project_reference, _fake_project),
    ("attention", attention_reference, _fake_attention),
    ("mix", mix_reference, _fake_mix),
    ("losses", losses_reference, _fake_losses),
):
    LIBRARY.impl(f"members_{_name}", _reference, "CPU")
    LIBRARY.impl(f"members_{_name}", _kernel(_name), "CUDA")
    torch.library.register_fake(f"ppf::members_{_name}", _fake, lib=LIBRARY)
