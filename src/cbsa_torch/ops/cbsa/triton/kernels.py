"""Triton kernels of CBSA: A is computed again tile by tile, and nothing of size M x N reaches memory.

Forward: ``extract`` (R = A V by an online softmax; ``merge`` joins its splits), then ``broadcast``
(O = A^T kappa C). Backward: ``collect`` (T = A dO), then ``gradients``. The contraction in between works on
M x P numbers per head and is left to torch.

A program reads ``span`` tokens of one head of one item. Partial results go to a workspace in float32 and are
added in a fixed order, without atomics: two runs agree in every bit. Tensors ``(B, H, rows, P)`` come as
tuples (pointer, item stride, head stride, row stride), M x P results and their operands contiguous. Logits
are in base 2: ``scale`` holds log2(e). A masked token is loaded as zero whatever it holds (0 * NaN is NaN)
and its logit is -inf; a representative without any real token has LSE = +inf, so that exp2(S - LSE) = 0.

float16 alone needs help with its range. A ~ 1/N would be subnormal: it is carried times 2^15 (A <= 1), by
``SHIFT`` inside the exponent, at no cost. kappa C and dR come with a power of two per head, to be undone by
``undo_carried`` and ``undo_picked``; dS takes its power of two from each tile's largest entry.

Triton's interpreter cannot compute in bfloat16, and truncates where hardware rounds to nearest:
``INTERPRETED`` keeps such numbers in float32, rounded as hardware does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cbsa_torch.ops.cbsa.triton.parts import (
    LN2,
    address,
    advance_softmax,
    attention,
    finish_softmax,
    half_range,
    load_lse,
    load_rows,
    place,
    real_tokens,
    round_to,
    store_rows,
)


@triton.jit
def extract(
    representatives: tl.tuple,
    keys: tl.tuple,
    values: tl.tuple,
    mask: tl.tensor,
    picked_out: tl.tensor,
    highest_out: tl.tensor,
    total_out: tl.tensor,
    heads: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    span: tl.tensor,
    scale: tl.tensor,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Softmax over ``span`` tokens for BLOCK_M representatives: weighted values, maximum and sum.

    Without ``total_out`` one span holds all tokens: R and the log-sum-exp are final, and need no ``merge``.
    """
    dtype: tl.constexpr = keys[0].dtype.element_ty
    SHIFT: tl.constexpr = 15.0 if dtype == tl.float16 else 0.0
    problem, split, first, last = place(N, span)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    exists = rows < M
    q_base = address(representatives, problem, heads, 0)
    q = load_rows(q_base, rows, exists, representatives[3], P, BLOCK_P, INTERPRETED)
    k_base = address(keys, problem, heads, first.to(tl.int64))
    if values is not None:
        v_base = address(values, problem, heads, first.to(tl.int64))
    if mask is not None:
        mask += (problem // heads) * N

    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    picked = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    for start in range(first, last, BLOCK_N):
        real = real_tokens(mask, start + columns, last)
        k = load_rows(k_base, columns, real, keys[3], P, BLOCK_P, INTERPRETED)
        v = k
        if values is not None:
            v = load_rows(v_base, columns, real, values[3], P, BLOCK_P, INTERPRETED)
            v_base += BLOCK_N * values[3]
        k_base += BLOCK_N * keys[3]
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BLOCK_M, BLOCK_N)
        logits = tl.where(real[None, :], logits, -float("inf"))
        reference, highest, total, picked = advance_softmax(highest, total, picked, tl.max(logits, 1))
        weights = tl.exp2(logits - (reference - SHIFT)[:, None])
        total += tl.sum(weights, 1)
        picked = tl.dot(round_to(weights, dtype, INTERPRETED), v, picked, input_precision="ieee")

    if total_out is None:
        picked, highest = finish_softmax(highest, total, picked, SHIFT)
    base = (problem * tl.cdiv(N, span) + split) * M
    tl.store(highest_out + base + rows, highest, mask=exists)
    if total_out is not None:
        tl.store(total_out + base + rows, total, mask=exists)
    store_rows(picked_out + base * P, rows, exists, P, picked, P, BLOCK_P, INTERPRETED)


@triton.jit
def merge(
    picked_in: tl.tensor,
    highest_in: tl.tensor,
    total_in: tl.tensor,
    picked_out: tl.tensor,
    lse_out: tl.tensor,
    M: tl.tensor,
    splits: tl.tensor,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SHIFT: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """R and the log-sum-exp from the splits of ``extract``, in their order."""
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < M
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    picked = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    base = problem * splits * M
    for _ in range(splits):
        newest = tl.load(highest_in + base + rows, mask=exists, other=-float("inf"))
        reference, highest, total, picked = advance_softmax(highest, total, picked, newest)
        weight = tl.exp2(newest - reference)
        total += weight * tl.load(total_in + base + rows, mask=exists, other=0.0)
        part = load_rows(picked_in + base * P, rows, exists, P, P, BLOCK_P, INTERPRETED)
        picked += weight[:, None] * part
        base += M
    picked, lse = finish_softmax(highest, total, picked, SHIFT)
    tl.store(lse_out + problem * M + rows, lse, mask=exists)
    store_rows(picked_out + problem * M * P, rows, exists, P, picked, P, BLOCK_P, INTERPRETED)


@triton.jit
def broadcast(
    representatives: tl.tuple,
    keys: tl.tuple,
    mask: tl.tensor,
    carried: tl.tensor,
    undo_carried: tl.tensor,
    lse: tl.tensor,
    output: tl.tuple,
    heads: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    span: tl.tensor,
    scale: tl.tensor,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """O = A^T kappa C of ``span`` tokens, over BLOCKS blocks of representatives.

    A is computed transposed, so that it enters the second product from registers.
    """
    dtype: tl.constexpr = keys[0].dtype.element_ty
    SHIFT: tl.constexpr = 15.0 if dtype == tl.float16 else 0.0
    problem, _, first, last = place(N, span)
    columns = tl.arange(0, BLOCK_N)
    q_base = address(representatives, problem, heads, 0)
    k_base = address(keys, problem, heads, first.to(tl.int64))
    o_base = address(output, problem, heads, first.to(tl.int64))
    if mask is not None:
        mask += (problem // heads) * N
    carried += problem * M * P
    lse += problem * M
    if undo_carried is not None:
        undo = tl.load(undo_carried + problem) * (1.0 / 32768.0)

    rows = tl.arange(0, BLOCK_M)
    if BLOCKS == 1:
        q = load_rows(q_base, rows, rows < M, representatives[3], P, BLOCK_P, INTERPRETED)
        c = load_rows(carried, rows, rows < M, P, P, BLOCK_P, INTERPRETED)
        level = load_lse(lse, rows, rows < M, SHIFT)
    for start in range(first, last, BLOCK_N):
        real = real_tokens(mask, start + columns, last)
        k = load_rows(k_base, columns, real, keys[3], P, BLOCK_P, INTERPRETED)
        k_base += BLOCK_N * keys[3]
        o = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        for block in range(BLOCKS):
            if BLOCKS > 1:
                part = block * BLOCK_M + rows
                q = load_rows(q_base, part, part < M, representatives[3], P, BLOCK_P, INTERPRETED)
                c = load_rows(carried, part, part < M, P, P, BLOCK_P, INTERPRETED)
                level = load_lse(lse, part, part < M, SHIFT)
            logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # (BLOCK_N, BLOCK_M)
            a = attention(logits, level[None, :], real[:, None])
            o = tl.dot(round_to(a, dtype, INTERPRETED), c, o, input_precision="ieee")
        if undo_carried is not None:
            o *= undo
        store_rows(o_base, columns, start + columns < last, output[3], o, P, BLOCK_P, INTERPRETED)
        o_base += BLOCK_N * output[3]


@triton.jit
def collect(
    representatives: tl.tuple,
    keys: tl.tuple,
    gradient: tl.tuple,
    mask: tl.tensor,
    lse: tl.tensor,
    collected_out: tl.tensor,
    heads: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    span: tl.tensor,
    scale: tl.tensor,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """T = A dO of ``span`` tokens and BLOCK_M representatives, one partial sum per split."""
    dtype: tl.constexpr = keys[0].dtype.element_ty
    SHIFT: tl.constexpr = 15.0 if dtype == tl.float16 else 0.0
    problem, split, first, last = place(N, span)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    exists = rows < M
    q_base = address(representatives, problem, heads, 0)
    q = load_rows(q_base, rows, exists, representatives[3], P, BLOCK_P, INTERPRETED)
    level = load_lse(lse + problem * M, rows, exists, SHIFT)
    k_base = address(keys, problem, heads, first.to(tl.int64))
    g_base = address(gradient, problem, heads, first.to(tl.int64))
    if mask is not None:
        mask += (problem // heads) * N

    collected = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    for start in range(first, last, BLOCK_N):
        real = real_tokens(mask, start + columns, last)
        k = load_rows(k_base, columns, real, keys[3], P, BLOCK_P, INTERPRETED)
        g = load_rows(g_base, columns, real, gradient[3], P, BLOCK_P, INTERPRETED)
        k_base += BLOCK_N * keys[3]
        g_base += BLOCK_N * gradient[3]
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BLOCK_M, BLOCK_N)
        a = attention(logits, level[:, None], real[None, :])
        collected = tl.dot(round_to(a, dtype, INTERPRETED), g, collected, input_precision="ieee")
    if dtype == tl.float16:
        collected *= 1.0 / 32768.0
    base = (problem * tl.cdiv(N, span) + split) * M * P
    store_rows(collected_out + base, rows, exists, P, collected, P, BLOCK_P, INTERPRETED)


@triton.jit
def gradients(
    representatives: tl.tuple,
    keys: tl.tuple,
    values: tl.tuple,
    gradient: tl.tuple,
    mask: tl.tensor,
    carried: tl.tensor,
    undo_carried: tl.tensor,
    d_picked: tl.tensor,
    undo_picked: tl.tensor,
    lse: tl.tensor,
    row_sums: tl.tensor,
    d_keys: tl.tuple,
    d_values: tl.tuple,
    d_representatives: tl.tensor,
    heads: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    span: tl.tensor,
    scale: tl.tensor,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Write dV = A^T dR and dK = dS^T Q of ``span`` tokens, and a partial sum of dQ = dS K per split.

    Here Q are the representatives, dS = A (dA - D) and dA = kappa C dO^T + dR V^T; all is transposed, tokens as
    rows, so that only dS has to leave registers, for dQ. One launch gives all three if registers allow. If not,
    a launch without ``d_representatives`` sums over BLOCKS blocks of representatives, and one without
    ``d_keys`` takes a block per program. Without ``d_values`` values are the keys, and ``d_keys`` gets both
    gradients.
    """
    dtype: tl.constexpr = keys[0].dtype.element_ty
    SHIFT: tl.constexpr = 15.0 if dtype == tl.float16 else 0.0
    problem, split, first, last = place(N, span)
    columns = tl.arange(0, BLOCK_N)
    q_base = address(representatives, problem, heads, 0)
    k_base = address(keys, problem, heads, first.to(tl.int64))
    g_base = address(gradient, problem, heads, first.to(tl.int64))
    if values is not None:
        v_base = address(values, problem, heads, first.to(tl.int64))
    if d_keys is not None:
        dk_base = address(d_keys, problem, heads, first.to(tl.int64))
    if d_values is not None:
        dv_base = address(d_values, problem, heads, first.to(tl.int64))
    if mask is not None:
        mask += (problem // heads) * N
    carried += problem * M * P
    d_picked += problem * M * P
    lse += problem * M
    row_sums += problem * M
    if undo_carried is not None:
        undo_c = tl.load(undo_carried + problem)
        undo_r = tl.load(undo_picked + problem)
    slope = scale * LN2  # of natural logits

    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < M
    if BLOCKS == 1:
        q = load_rows(q_base, rows, exists, representatives[3], P, BLOCK_P, INTERPRETED)
        c = load_rows(carried, rows, exists, P, P, BLOCK_P, INTERPRETED)
        r = load_rows(d_picked, rows, exists, P, P, BLOCK_P, INTERPRETED)
        level = load_lse(lse, rows, exists, SHIFT)
        centre = tl.load(row_sums + rows, mask=exists, other=0.0) * slope
    if d_representatives is not None:
        dq = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    for start in range(first, last, BLOCK_N):
        real = real_tokens(mask, start + columns, last)
        k = load_rows(k_base, columns, real, keys[3], P, BLOCK_P, INTERPRETED)
        g = load_rows(g_base, columns, real, gradient[3], P, BLOCK_P, INTERPRETED)
        k_base += BLOCK_N * keys[3]
        g_base += BLOCK_N * gradient[3]
        v = k
        if values is not None:
            v = load_rows(v_base, columns, real, values[3], P, BLOCK_P, INTERPRETED)
            v_base += BLOCK_N * values[3]
        dk = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        for block in range(BLOCKS):
            if BLOCKS > 1:
                part = block * BLOCK_M + rows
                q = load_rows(q_base, part, part < M, representatives[3], P, BLOCK_P, INTERPRETED)
                c = load_rows(carried, part, part < M, P, P, BLOCK_P, INTERPRETED)
                r = load_rows(d_picked, part, part < M, P, P, BLOCK_P, INTERPRETED)
                level = load_lse(lse, part, part < M, SHIFT)
                centre = tl.load(row_sums + part, mask=part < M, other=0.0) * slope
            logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # (BLOCK_N, BLOCK_M)
            a = attention(logits, level[None, :], real[:, None])
            d_a = tl.dot(g, tl.trans(c), input_precision="ieee")
            if dtype == tl.float16:
                d_a = d_a * undo_c + tl.dot(v, tl.trans(r)) * undo_r
            else:
                d_a = tl.dot(v, tl.trans(r), d_a, input_precision="ieee")
            d_s = a * (d_a * slope - centre[None, :])  # of the logits before scaling
            if dtype == tl.float16:
                d_s, undo_s = half_range(d_s)
                undo_s *= 1.0 / 32768.0
            d_s = round_to(d_s, dtype, INTERPRETED)
            a = round_to(a, dtype, INTERPRETED)
            if d_keys is not None:
                if dtype == tl.float16:
                    from_values = tl.dot(a, r) * (undo_r * (1.0 / 32768.0))
                    dk += tl.dot(d_s, q) * undo_s
                    if d_values is None:
                        dk += from_values
                    else:
                        dv += from_values
                else:
                    dk = tl.dot(d_s, q, dk, input_precision="ieee")
                    if d_values is None:
                        dk = tl.dot(a, r, dk, input_precision="ieee")
                    else:
                        dv = tl.dot(a, r, dv, input_precision="ieee")
            if d_representatives is not None:
                if dtype == tl.float16:
                    dq += tl.dot(tl.trans(d_s), k) * undo_s
                else:
                    dq = tl.dot(tl.trans(d_s), k, dq, input_precision="ieee")
        here = start + columns < last
        if d_keys is not None:
            store_rows(dk_base, columns, here, d_keys[3], dk, P, BLOCK_P, INTERPRETED)
            dk_base += BLOCK_N * d_keys[3]
        if d_values is not None:
            store_rows(dv_base, columns, here, d_values[3], dv, P, BLOCK_P, INTERPRETED)
            dv_base += BLOCK_N * d_values[3]
    if d_representatives is not None:
        base = (problem * tl.cdiv(N, span) + split) * M * P
        store_rows(d_representatives + base, rows, exists, P, dq, P, BLOCK_P, INTERPRETED)
