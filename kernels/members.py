"""A small model (hidden size up to 256) for many policies at once: three kernels a layer and one for the losses.

A batch has members: distinct beginnings of policies, each with all tokens of the text. Tables on the device say which
member's activations a member continues and at which levels; programs stop at their member's width, so nothing is
computed that is pruned and the host does no work per policy. Attention is computed once for all members that continue
the same activations, at the widest of their levels: a level's heads are a prefix of it. One block of tokens holds a
whole row of the residual stream, so norms, rotation, residual sums, silu·mul and softmax stay in registers; of a layer
only q, k, v, the attention's output and the residual stream travel through memory.

Rows of q and k are interleaved within a head (0, d/2, 1, d/2+1, …), rows of gate and up within the FFN: what is
combined elementwise then lies in neighbouring columns of one product. What only some families have (biases, norms of
heads and of what a sub-layer gives, a window, another activation) comes as pointers that may be None and as constants:
a kernel without it is compiled as if it were not written here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tile import precision


@triton.jit
def _rms_norm(x, weight, epsilon, DTYPE: tl.constexpr, H: tl.constexpr):
    """x fp32 [BM, H] over its root mean square, times the weight of any dtype."""
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / H + epsilon)
    w = tl.load(weight + tl.arange(0, H))
    return (x * scale[:, None] * w.to(tl.float32)[None, :]).to(DTYPE)


@triton.jit
def _rows(base, member, m, tokens, width, BLOCK: tl.constexpr):
    """Addresses [BM, BLOCK] of the first columns of one member's token rows m."""
    return base + (member.to(tl.int64) * tokens + m)[:, None] * width + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _norm_heads(acc, weight, start, epsilon, GROUP_ROWS: tl.constexpr, ROTATED: tl.constexpr, D: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """Columns [start, start + BN) of q, k and v fp32 [BM, BN], whole heads: every head of q and k over its root mean
    square. ``weight`` fp32 [GROUP_ROWS] has ones for v."""
    heads = tl.reshape(acc, [BM, BN // D, D])
    within = (start + D * tl.arange(0, BN // D)) % GROUP_ROWS
    scale = 1.0 / tl.sqrt(tl.sum(heads * heads, 2) / D + epsilon)
    scale = tl.where((within < ROTATED)[None, :], scale, 1.0)
    w = tl.load(weight + (start + tl.arange(0, BN)) % GROUP_ROWS)
    return tl.reshape(heads * scale[:, :, None], [BM, BN]) * w[None, :]


@triton.jit
def project_kernel(
    x, norm, weight, bias, head_norm, cos, sin, level, y, tokens, length, width, epsilon,
    GROUP_ROWS: tl.constexpr, ROTATED: tl.constexpr, D: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Norm, then q, k and v of the kept kv-groups: their biases, norms of the heads of q and k, and those rotated."""
    member = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (m < tokens)[:, None]
    kept = tl.load(level + member) * GROUP_ROWS
    k = tl.arange(0, H)
    if kept > 0:
        rows = tl.load(_rows(x, member, m, tokens, H, H), mask=inside, other=0.0)
        normed = _rms_norm(rows.to(tl.float32), norm, epsilon, x.dtype.element_ty, H)
        angles = (m % length)[:, None] * (D // 2)
        for start in range(0, kept, BN):
            n = start + tl.arange(0, BN)
            w = tl.load(weight + n[:, None] * H + k[None, :], mask=(n < kept)[:, None], other=0.0)
            acc = tl.dot(normed, w.T, input_precision=PRECISION)
            if bias is not None:
                acc += tl.load(bias + n, mask=n < kept, other=0.0).to(tl.float32)[None, :]
            if head_norm is not None:
                acc = _norm_heads(acc, head_norm, start, epsilon, GROUP_ROWS, ROTATED, D, BM, BN)
            within = (start + 2 * tl.arange(0, BN // 2)) % GROUP_ROWS
            turned = (within < ROTATED)[None, :]
            angle = angles + (within % D // 2)[None, :]
            c = tl.load(cos + angle, mask=turned, other=1.0)
            s = tl.load(sin + angle, mask=turned, other=0.0)
            first, second = tl.split(tl.reshape(acc, [BM, BN // 2, 2]))
            out = tl.reshape(tl.join(first * c - second * s, second * c + first * s), [BM, BN])
            at = _rows(y, member, m, tokens, width, BN) + start
            tl.store(at, out.to(y.dtype.element_ty), mask=inside & (n < kept)[None, :])


@triton.jit
def _attend(q, k_rows, v_rows, m, start, length, width, best, total, acc, scale, DIAGONAL: tl.constexpr,
            WINDOW: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """One step of streaming softmax over keys [start, start + BN). With a ``WINDOW`` a query sees so many keys."""
    n = start + tl.arange(0, BN)
    offset = start * width
    if DIAGONAL:
        k = tl.load(k_rows + offset, mask=(n < length)[:, None], other=0.0)
        v = tl.load(v_rows + offset, mask=(n < length)[:, None], other=0.0)
    else:
        k = tl.load(k_rows + offset)
        v = tl.load(v_rows + offset)
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    if DIAGONAL:
        scores = tl.where(m[:, None] >= n[None, :], scores, float("-inf"))
    if WINDOW:
        scores = tl.where(m[:, None] - n[None, :] < WINDOW, scores, float("-inf"))
    new = tl.maximum(best, tl.max(scores, 1))
    # With a window a query may have seen no key yet, and infinity less infinity is no number. A large finite score in
    # its place would not do either: a fused multiply and add leaves the rounding of its product, which is large too.
    base = tl.where(new == float("-inf"), 0.0, new) if WINDOW else new
    p = tl.exp2(scores * scale - (base * scale)[:, None])
    shrink = tl.exp2((best - base) * scale)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new, total * shrink + tl.sum(p, 1), acc


@triton.jit
def attention_kernel(
    qkv, level, y, tokens, length, width, width_y, scale,
    HEADS: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Causal attention of one head, one sequence and BM queries; BM is a multiple of BN. ``WINDOW`` 0 is none."""
    member = tl.program_id(2)
    head = tl.program_id(1)
    sequences = tokens // length
    tile = tl.program_id(0) // sequences
    sequence = tl.program_id(0) % sequences
    group = head // HEADS
    if group < tl.load(level + member):
        m = tile * BM + tl.arange(0, BM)
        lane = tl.arange(0, D)[None, :]
        first = member.to(tl.int64) * tokens + sequence * length
        base = qkv + first * width + group * (HEADS + 2) * D + lane
        q_rows = base + m[:, None] * width + head % HEADS * D
        q = tl.load(q_rows, mask=(m < length)[:, None], other=0.0)
        k_rows = base + tl.arange(0, BN)[:, None] * width + HEADS * D
        v_rows = k_rows + D
        best = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, D], tl.float32)
        whole = 0  # the first step all of whose keys all queries see
        if WINDOW:
            low = tl.maximum(tile * BM - WINDOW + 1, 0) // BN * BN
            whole = tl.minimum(tl.cdiv(tl.maximum(tile * BM + BM - WINDOW, 0), BN) * BN, tile * BM)
            for start in range(low, whole, BN):
                best, total, acc = _attend(
                    q, k_rows, v_rows, m, start, length, width, best, total, acc, scale, False, WINDOW, PRECISION, BN
                )
        for start in range(whole, tile * BM, BN):
            best, total, acc = _attend(
                q, k_rows, v_rows, m, start, length, width, best, total, acc, scale, False, 0, PRECISION, BN
            )
        for start in range(tile * BM, tl.minimum(tile * BM + BM, length), BN):
            best, total, acc = _attend(
                q, k_rows, v_rows, m, start, length, width, best, total, acc, scale, True, WINDOW, PRECISION, BN
            )
        at = y + (first + m)[:, None] * width_y + head * D + lane
        tl.store(at, (acc / total[:, None]).to(y.dtype.element_ty), mask=(m < length)[:, None])


@triton.jit
def _activated(gate, up, GELU: tl.constexpr):
    """silu(gate) · up in fp32, or with GELU in its tanh form: x · (1 + tanh u) / 2 is x · sigmoid(2u)."""
    if GELU:
        return gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))) * up
    else:
        return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def mix_kernel(
    x, inner, o, o_bias, after_attention, norm, gate_up, gate_up_bias, down, down_bias, after_ffn,
    source, level_attention, level_ffn, y, tokens, epsilon,
    width_inner, stride_o_level, stride_o, stride_down_level, stride_down,
    UNIT: tl.constexpr, MULTIPLE: tl.constexpr, GELU: tl.constexpr, H: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The rest of a layer: residual sum of o, norm, gate and up, activation, residual sum of down."""
    member = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (m < tokens)[:, None]
    k = tl.arange(0, H)
    origin = tl.load(source + member)
    attention = tl.load(level_attention + member)
    ffn = tl.load(level_ffn + member)
    if after_attention is not None:
        acc = tl.zeros([BM, H], tl.float32)
    else:
        acc = tl.load(_rows(x, origin, m, tokens, H, H), mask=inside, other=0.0).to(tl.float32)

    kept = attention * UNIT
    inner_rows = _rows(inner, origin, m, tokens, width_inner, BK)
    o_rows = o + attention.to(tl.int64) * stride_o_level + k[:, None] * stride_o + tl.arange(0, BK)[None, :]
    for start in range(0, kept, BK):
        column = (start + tl.arange(0, BK) < kept)[None, :]
        a = tl.load(inner_rows + start, mask=inside & column, other=0.0)
        b = tl.load(o_rows + start, mask=column, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    if o_bias is not None:
        acc += tl.where(attention > 0, tl.load(o_bias + k).to(tl.float32), 0.0)[None, :]
    if after_attention is not None:
        residual = tl.load(_rows(x, origin, m, tokens, H, H), mask=inside, other=0.0).to(tl.float32)
        acc = residual + _rms_norm(acc, after_attention, epsilon, tl.float32, H)

    normed = _rms_norm(acc, norm, epsilon, x.dtype.element_ty, H)
    if after_ffn is not None:
        residual = acc
        acc = tl.zeros([BM, H], tl.float32)
    width = ffn * MULTIPLE
    down_rows = down + ffn.to(tl.int64) * stride_down_level + k[:, None] * stride_down + tl.arange(0, BC)[None, :]
    for start in range(0, width, BC):
        n = 2 * start + tl.arange(0, 2 * BC)
        w = tl.load(gate_up + n[:, None] * H + k[None, :], mask=(n < 2 * width)[:, None], other=0.0)
        both = tl.dot(normed, w.T, input_precision=PRECISION)
        if gate_up_bias is not None:
            both += tl.load(gate_up_bias + n, mask=n < 2 * width, other=0.0).to(tl.float32)[None, :]
        gate, up = tl.split(tl.reshape(both, [BM, BC, 2]))
        act = _activated(gate, up, GELU).to(normed.dtype)
        b = tl.load(down_rows + start, mask=(start + tl.arange(0, BC) < width)[None, :], other=0.0)
        acc = tl.dot(act, b.T, acc, input_precision=PRECISION)
    if down_bias is not None:
        acc += tl.where(ffn > 0, tl.load(down_bias + k).to(tl.float32), 0.0)[None, :]
    if after_ffn is not None:
        acc = residual + _rms_norm(acc, after_ffn, epsilon, tl.float32, H)
    tl.store(_rows(y, member, m, tokens, H, H), acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def loss_kernel(
    x, norm, head, targets, sums, tokens, length, vocabulary, epsilon,
    H: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Sum over BM tokens of -log softmax(head · norm(x))[target], without the last token of each sequence."""
    member = tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    counted = (m < tokens) & (m % length != length - 1)
    k = tl.arange(0, H)
    rows = tl.load(_rows(x, member, m, tokens, H, H), mask=(m < tokens)[:, None], other=0.0)
    normed = _rms_norm(rows.to(tl.float32), norm, epsilon, x.dtype.element_ty, H)
    best = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in range(0, vocabulary, BV):
        n = start + tl.arange(0, BV)
        w = tl.load(head + n[:, None] * H + k[None, :], mask=(n < vocabulary)[:, None], other=0.0)
        logits = tl.dot(normed, w.T, input_precision=PRECISION) * 1.4426950408889634
        logits = tl.where((n < vocabulary)[None, :], logits, float("-inf"))
        new = tl.maximum(best, tl.max(logits, 1))
        total = total * tl.exp2(best - new) + tl.sum(tl.exp2(logits - new[:, None]), 1)
        best = new
    target = tl.load(targets + m, mask=counted, other=0)
    chosen = tl.load(head + target[:, None] * H + k[None, :], mask=counted[:, None], other=0.0)
    logit = tl.sum(normed.to(tl.float32) * chosen.to(tl.float32), 1)
    loss = (best + tl.log2(total)) * 0.6931471805599453 - logit
    tl.store(sums + member * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(counted, loss, 0.0)))


# Measured on an H100, hidden size 256, 49,152 tokens. Thin steps pipelined three deep beat thick ones: the residual sum
# alone takes half of the registers.
PROJECT = {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 1}
ATTENTION = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 3}
MIX = {"BM": 128, "BK": 64, "BC": 16, "num_warps": 8, "num_stages": 3}
# With a norm after a sub-layer its sum stands beside the residual one: of half as many tokens, or registers spill.
SANDWICHED = MIX | {"BM": 64}
LOSS = {"BM": 64, "BV": 64, "num_warps": 4, "num_stages": 2}


def project(
    x: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, head_norm: Tensor | None, cos: Tensor, sin: Tensor,
    level: Tensor, length: int, group_rows: int, epsilon: float, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [D, N, H] of D members -> q, k and v [D, N, rows of weight]; undefined past each member's kept rows."""
    members, tokens, hidden = x.shape
    c, d = config or PROJECT, 2 * cos.shape[-1]
    y = x.new_empty(members, tokens, len(weight))
    project_kernel[triton.cdiv(tokens, c["BM"]), members](
        x, norm, weight, bias, head_norm, cos, sin, level, y, tokens, length, len(weight), epsilon,
        GROUP_ROWS=group_rows, ROTATED=group_rows - d, D=d, H=hidden, PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    return y


def attention(
    qkv: Tensor, level: Tensor, length: int, heads: int, head_dim: int, scale: float, window: int,
    config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """q, k and v [D, N, G·(g+2)·d] of sequences of ``length`` -> [D, N, G·g·d]; undefined past the kept groups."""
    members, tokens, width = qkv.shape
    groups, c = width // ((heads + 2) * head_dim), config or ATTENTION
    y = qkv.new_empty(members, tokens, groups * heads * head_dim)
    attention_kernel[triton.cdiv(length, c["BM"]) * (tokens // length), groups * heads, members](
        qkv, level, y, tokens, length, width, y.shape[2], scale * 1.4426950408889634, HEADS=heads, D=head_dim,
        WINDOW=window, PRECISION=precision(qkv.dtype), **c,
    )  # fmt: skip
    return y


def mix(
    x: Tensor, inner: Tensor, o: Tensor, o_bias: Tensor | None, after_attention: Tensor | None,
    norm: Tensor, gate_up: Tensor, gate_up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    after_ffn: Tensor | None, source: Tensor, level_attention: Tensor, level_ffn: Tensor, unit: int, multiple: int,
    epsilon: float, activation: str, config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [E, N, H], inner [E, N, G·g·d], o [levels, H, G·g·d], down [levels, H, C] -> the layer's output [D, N, H]."""
    members, tokens, hidden = len(level_ffn), x.shape[1], x.shape[2]
    c = config or (MIX if after_attention is None and after_ffn is None else SANDWICHED)
    y = x.new_empty(members, tokens, hidden)
    mix_kernel[triton.cdiv(tokens, c["BM"]), members](
        x, inner, o, o_bias, after_attention, norm, gate_up, gate_up_bias, down, down_bias, after_ffn,
        source, level_attention, level_ffn, y, tokens, epsilon,
        inner.shape[2], o.stride(0), o.stride(1), down.stride(0), down.stride(1), UNIT=unit, MULTIPLE=multiple,
        GELU=activation != "silu", H=hidden, PRECISION=precision(x.dtype), **c,
    )  # fmt: skip
    return y


def losses(
    x: Tensor, norm: Tensor, head: Tensor, targets: Tensor, length: int, epsilon: float,
    config: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """x [D, N, H] and the next token of every token int64 [N] -> summed losses fp64 [D]."""
    members, tokens, hidden = x.shape
    c = config or LOSS
    tiles = triton.cdiv(tokens, c["BM"])
    sums = torch.empty(members, tiles, dtype=torch.float32, device=x.device)
    loss_kernel[tiles, members](
        x, norm, head, targets, sums, tokens, length, len(head), epsilon, H=hidden, PRECISION=precision(x.dtype), **c
    )
    return sums.double().sum(1)
