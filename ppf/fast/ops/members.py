"""Ops of batched evaluation: a layer of many policies' members at once; see ``ppf.kernels.members`` for the layout.

D members share N tokens (sequences of one length). Tables are int32 [D] on the activations' device and not checked: the
evaluator makes them. The kernels leave columns past a member's width undefined, the references leave zeros there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .library import LIBRARY

LIBRARY.define(
    "members_project(Tensor x, Tensor norm, Tensor weight, Tensor cos, Tensor sin, Tensor level, "
    "int length, int group_rows, float epsilon) -> Tensor"
)
LIBRARY.define("members_attention(Tensor qkv, Tensor level, int length, int heads, int head_dim) -> Tensor")
LIBRARY.define(
    "members_mix(Tensor x, Tensor inner, Tensor o, Tensor norm, Tensor gate_up, Tensor down, Tensor source, "
    "Tensor level_attention, Tensor level_ffn, int unit, int multiple, float epsilon) -> Tensor"
)
LIBRARY.define(
    "members_losses(Tensor x, Tensor norm, Tensor head, Tensor targets, int length, float epsilon) -> Tensor"
)


def interleave_heads(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k [heads·d, H] with those that a rotation combines side by side: 0, d/2, 1, d/2+1, … of a head."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """[2C, H]: gate row 0, up row 0, gate row 1, …"""
    return torch.stack((gate, up), 1).flatten(0, 1)


def project_reference(
    x: Tensor, norm: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, level: Tensor, length: int, group_rows: int,
    epsilon: float,
) -> Tensor:  # fmt: skip
    """x [D, N, H]; weight [G·(g+2)·d, H], q and k rows interleaved; cos, sin [length, d/2] -> [D, N, G·(g+2)·d]."""
    y = x.new_zeros(len(level), x.shape[1], len(weight))
    d = 2 * cos.shape[1]
    for member, groups in enumerate(level.tolist()):
        kept = groups * group_rows
        normed = F.rms_norm(x[member], norm.shape, norm, epsilon)
        out = F.linear(normed, weight[:kept]).view(len(y[0]) // length, length, groups, group_rows)
        turned = out[..., : group_rows - d].unflatten(-1, (-1, d // 2, 2))
        c, s = cos[:, None, None, :], sin[:, None, None, :]
        first, second = turned[..., 0] * c - turned[..., 1] * s, turned[..., 1] * c + turned[..., 0] * s
        rotated = torch.stack((first, second), -1).flatten(-3).to(x.dtype)
        y[member, :, :kept] = torch.cat((rotated, out[..., group_rows - d :]), -1).reshape(x.shape[1], kept)
    return y


def attention_reference(qkv: Tensor, level: Tensor, length: int, heads: int, head_dim: int) -> Tensor:
    """Causal attention within sequences of ``length``: [D, N, G·(g+2)·d] -> [D, N, G·g·d]."""
    members, tokens, width = qkv.shape
    groups = width // ((heads + 2) * head_dim)
    parts = qkv.view(members, -1, length, groups, heads + 2, head_dim).permute(0, 1, 3, 4, 2, 5)
    q, k, v = parts.split([heads, 1, 1], dim=3)
    out = F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True)
    out = out.permute(0, 1, 4, 2, 3, 5).reshape(members, tokens, groups, heads * head_dim)
    kept = torch.arange(groups, device=qkv.device) < level[:, None]
    return (out * kept[:, None, :, None]).flatten(2)


def mix_reference(
    x: Tensor, inner: Tensor, o: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, source: Tensor,
    level_attention: Tensor, level_ffn: Tensor, unit: int, multiple: int, epsilon: float,
) -> Tensor:  # fmt: skip
    """x [E, N, H] and inner [E, N, G·g·d] -> the layer's output [D, N, H].

    o [levels, H, G·g·d] and down [levels, H, C] give every level's weight.
    """
    y = x.new_empty(len(level_ffn), *x.shape[1:])
    tables = (t.tolist() for t in (source, level_attention, level_ffn))
    for member, (origin, a, f) in enumerate(zip(*tables, strict=True)):
        residual = x[origin] + F.linear(inner[origin, :, : a * unit], o[a][:, : a * unit])
        normed = F.rms_norm(residual, norm.shape, norm, epsilon)
        gate, up = F.linear(normed, gate_up[: 2 * f * multiple]).unflatten(-1, (-1, 2)).unbind(-1)
        y[member] = residual + F.linear(F.silu(gate) * up, down[f][:, : f * multiple])
    return y


def losses_reference(x: Tensor, norm: Tensor, head: Tensor, targets: Tensor, length: int, epsilon: float) -> Tensor:
    """Summed negative log-likelihoods fp64 [D]; the last token of every sequence predicts nothing."""
    counted = torch.arange(len(targets), device=x.device) % length != length - 1
    logits = F.linear(F.rms_norm(x[:, counted], norm.shape, norm, epsilon), head).float()
    target = targets[counted].expand(len(x), -1)
    return F.cross_entropy(logits.transpose(1, 2), target, reduction="none").double().sum(1)


def _kernel(name: str):
    def call(*arguments):
        from ppf.kernels import members

        return getattr(members, name)(*arguments)

    return call


def _fake_project(x, norm, weight, cos, sin, level, length, group_rows, epsilon):
    return x.new_empty(len(level), x.shape[1], len(weight))


def _fake_attention(qkv, level, length, heads, head_dim):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // (heads + 2) * heads)


def _fake_mix(x, inner, o, norm, gate_up, down, source, level_attention, level_ffn, *_):
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
