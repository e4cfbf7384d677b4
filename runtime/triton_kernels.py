"""The Triton kernels of ``runtime.kernels``; imported by it on first use, so that nothing else needs Triton.

Loop bounds are compile-time constants and bfloat16 products are left to the GPU: the interpreter can do neither.
Shape letters: M tokens, N output and K input features, g group_size, KG groups of a row, R word rows, V values a word.
"""

# ruff: noqa: N806

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add_group(
    acc,
    values,
    scale,
    zero,
    x,
    row,
    row_mask,
    token,
    token_mask,
    group,
    K,
    g: tl.constexpr,
    KG: tl.constexpr,
    BM: tl.constexpr,
    DOT: tl.constexpr,
):
    """acc [BM, BN] (BM = 1: [BN]) + x[:, group] @ (scale * (values - zero)).T; ``values`` int32 [BN, g] are codes."""
    position = tl.arange(0, g)
    xs = tl.load(x + token[:, None] * K + group * g + position[None, :], mask=token_mask[:, None], other=0.0)
    scales = tl.load(scale + row * KG + group, mask=row_mask, other=0.0).to(tl.float32)
    zeros = tl.load(zero + row * KG + group, mask=row_mask, other=0.0).to(tl.float32)
    if BM == 1:
        xs = xs.to(tl.float32)
        product = tl.sum(values.to(tl.float32) * xs, axis=1)
        acc += (product - zeros * tl.sum(xs, axis=1)) * scales
    else:
        xs = xs.to(DOT)
        product = tl.dot(xs, tl.trans(values.to(DOT)), input_precision="ieee")
        total = tl.sum(xs.to(tl.float32), axis=1)
        acc += (product - total[:, None] * zeros[None, :]) * scales[None, :]
    return acc


@triton.jit
def _product(
    codes,
    scale,
    zero,
    x,
    row,
    token,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    g: tl.constexpr,
    BITS: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):
    """x [M, K] times the rows ``row`` [BN] of one quantized matrix: float32 [BM, BN]."""
    KG: tl.constexpr = K // g
    R: tl.constexpr = (N * KG + V - 1) // V
    MASK: tl.constexpr = (1 << BITS) - 1
    Q: tl.constexpr = KG // V if ROWS else 0  # word rows that hold groups of one row only
    REST: tl.constexpr = KG - Q * V
    UNROLL: tl.constexpr = 4 // V if V < 4 else 1  # loads under way at a time
    row_mask = row < N
    token_mask = token < M
    position = tl.arange(0, g)
    acc = tl.zeros([BN] if BM == 1 else [BM, BN], dtype=tl.float32)  # one token: in the sums' own layout
    for word in tl.range(Q, loop_unroll_factor=UNROLL):
        at = codes + (row * Q + word)[:, None] * g + position[None, :]
        words = tl.load(at, mask=row_mask[:, None], other=0).to(tl.int32)
        for v in tl.static_range(V):
            values = (words >> (BITS * (V - 1 - v))) & MASK
            acc = _add_group(
                acc, values, scale, zero, x, row, row_mask, token, token_mask, word * V + v, K, g, KG, BM, DOT
            )
    for left in range(REST):
        if ROWS:
            index = row * REST + left
            word_row = N * Q + index // V
            value = index % V
        else:
            index = row * KG + left
            value = index // R
            word_row = index % R
        words = tl.load(codes + word_row[:, None] * g + position[None, :], mask=row_mask[:, None], other=0).to(tl.int32)
        values = (words >> (BITS * (V - 1 - value))[:, None]) & MASK
        acc = _add_group(acc, values, scale, zero, x, row, row_mask, token, token_mask, Q * V + left, K, g, KG, BM, DOT)
    return acc[None, :] if BM == 1 else acc


@triton.jit
def _add_bias(acc, biases, row, row_mask):
    return acc + tl.load(biases + row, mask=row_mask, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["M"])
def gate_up(
    out,
    codes,
    scale,
    zero,
    biases,
    x,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    g: tl.constexpr,
    BITS: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BIASED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):
    """out [M, N] = the gated product of x @ gate.T and x @ up.T; gate and up stand behind each other, biases too."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    G: tl.constexpr = N * (K // g)
    WORDS: tl.constexpr = (G + V - 1) // V * g
    gate = _product(codes, scale, zero, x, row, token, M, N, K, g, BITS, V, ROWS, BM, BN, DOT)
    up = _product(codes + WORDS, scale + G, zero + G, x, row, token, M, N, K, g, BITS, V, ROWS, BM, BN, DOT)
    if BIASED:
        gate = _add_bias(gate, biases, row, row < N)
        up = _add_bias(up, biases + N, row, row < N)
    if ACT == "silu":
        gate = gate * tl.sigmoid(gate)
    elif ACT == "gelu":
        gate = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    elif ACT == "clamped":
        gate = tl.minimum(gate, LIMIT)
        gate = gate * tl.sigmoid(gate * ALPHA)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1.0
    else:
        gate = tl.maximum(gate, 0.0)
    mask = (token < M)[:, None] & (row < N)[None, :]
    tl.store(out + token[:, None] * N + row[None, :], gate * up, mask=mask)


@triton.jit(do_not_specialize=["M"])
def down(
    out,
    codes,
    scale,
    zero,
    biases,
    x,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    g: tl.constexpr,
    BITS: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    BIASED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):
    """out [M, N] = x @ down.T, plus biases."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    product = _product(codes, scale, zero, x, row, token, M, N, K, g, BITS, V, ROWS, BM, BN, DOT)
    if BIASED:
        product = _add_bias(product, biases, row, row < N)
    mask = (token < M)[:, None] & (row < N)[None, :]
    tl.store(out + token[:, None] * N + row[None, :], product.to(out.dtype.element_ty), mask=mask)
