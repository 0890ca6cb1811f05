"""Triton kernels of the fused CBSA: A is rebuilt tile by tile, and nothing of size M x N reaches memory.

Forward: ``extract`` (R = A V by an online softmax, and ``merge`` of its splits), then ``broadcast``
(O = A^T kappa C). Backward: ``collect`` (T = A dO), then ``gradients``. The contraction between the two
passes works on M x P numbers per head and is left to torch.

A program reads ``span`` tokens of one head of one item; partial results go to a workspace in float32 and are
added in a fixed order, without atomics, so that two runs agree in every bit. Logits are in base 2: ``scale``
holds log2(e). A masked token is loaded as zero whatever it holds (0 * NaN is NaN) and its logit is -inf; a
representative without any real token has LSE = +inf, which makes every later exp2(S - LSE) zero.

float16 alone needs help with its range. A ~ 1/N would be subnormal: it is carried times 2^15 (A <= 1), by an
exponent shifted inside exp2, at no cost. kappa C and dR arrive with a power of two per head, whose inverses
are ``undo_carried`` and ``undo_picked``; dS takes its power of two from each tile's largest entry.

Triton's interpreter cannot compute in bfloat16 and truncates where hardware rounds to nearest:
``INTERPRETED`` keeps such numbers in float32, rounded as the hardware would.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _round(x: tl.tensor, dtype: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Float32 to an operand of ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    else:  # noqa: RET505, Triton returns from both branches of a constexpr or from none
        return x.to(dtype)


@triton.jit
def _shift(dtype: tl.constexpr) -> tl.tensor:
    """log2 of the factor on A."""
    return 15.0 if dtype == tl.float16 else 0.0


@triton.jit
def _inside(keep: tl.tensor, columns: tl.tensor, P: tl.constexpr, BLOCK_P: tl.constexpr) -> tl.tensor:
    """Mask of the entries that exist; one column wide where every column does."""
    if BLOCK_P > P:
        return keep[:, None] & (columns < P)[None, :]
    else:  # noqa: RET505
        return keep[:, None]


@triton.jit
def _load(
    base: tl.tensor,
    rows: tl.tensor,
    keep: tl.tensor,
    stride: tl.tensor,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """Rows ``(R, BLOCK_P)``, zero where ``keep`` is not set."""
    columns = tl.arange(0, BLOCK_P)
    inside = _inside(keep, columns, P, BLOCK_P)
    x = tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    if INTERPRETED and base.dtype.element_ty == tl.bfloat16:
        x = x.to(tl.float32)
    return x


@triton.jit
def _store(
    base: tl.tensor,
    rows: tl.tensor,
    keep: tl.tensor,
    stride: tl.tensor,
    x: tl.tensor,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    columns = tl.arange(0, BLOCK_P)
    inside = _inside(keep, columns, P, BLOCK_P)
    x = _round(x, base.dtype.element_ty, INTERPRETED)
    tl.store(base + rows[:, None] * stride + columns[None, :], x, mask=inside)


@triton.jit
def _real(
    mask: tl.tensor, start: tl.tensor, rows: tl.tensor, last: tl.tensor, MASKED: tl.constexpr
) -> tl.tensor:
    """Which tokens ``start + rows`` count: those before ``last`` that are not masked."""
    real = start + rows < last
    if MASKED:
        real = real & (tl.load(mask + start + rows, mask=real, other=0) != 0)
    return real


@triton.jit
def _weights(logits: tl.tensor, reference: tl.tensor, real: tl.tensor) -> tl.tensor:
    """exp2(logits - reference), zero for tokens that do not count."""
    return tl.exp2(tl.where(real, logits - reference, -float("inf")))


@triton.jit
def _load_lse(
    lse: tl.tensor, rows: tl.tensor, keep: tl.tensor, dtype: tl.constexpr
) -> tl.tensor:
    """Log-sum-exp in base 2, less the factor on A; +inf, so that A = 0, for rows of padding."""
    return tl.load(lse + rows, mask=keep, other=float("inf")) * LOG2E - _shift(dtype)


@triton.jit
def _normalise(
    highest: tl.tensor, total: tl.tensor, picked: tl.tensor, dtype: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """R and the natural log-sum-exp of a finished softmax; 0 and +inf for a row without any token."""
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    lse = (highest + tl.log2(divisor) - _shift(dtype)) * LN2
    return picked / divisor[:, None], tl.where(empty, float("inf"), lse)


@triton.jit
def _accumulate(
    highest: tl.tensor, total: tl.tensor, picked: tl.tensor, tile_highest: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Move an online softmax to the maximum with ``tile_highest``: what weights are now relative to is first."""
    now = tl.maximum(highest, tile_highest)
    reference = tl.where(now == -float("inf"), 0.0, now)  # a row that is masked so far
    decay = tl.exp2(highest - reference)
    return reference, now, total * decay, picked * decay[:, None]


@triton.jit
def extract(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    mask: tl.tensor,
    highest_out: tl.tensor,
    total_out: tl.tensor,
    picked_out: tl.tensor,
    query_item: tl.tensor,
    query_head: tl.tensor,
    query_row: tl.tensor,
    key_item: tl.tensor,
    key_head: tl.tensor,
    key_row: tl.tensor,
    value_item: tl.tensor,
    value_head: tl.tensor,
    value_row: tl.tensor,
    mask_item: tl.tensor,
    heads: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    span: tl.tensor,
    scale: tl.tensor,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Softmax over ``span`` tokens: maximum, sum and weighted values of BLOCK_M representatives.

    ``WHOLE``, one span holds all tokens: R and the log-sum-exp (to ``highest_out``) at once, without a merge.
    """
    dtype = keys.dtype.element_ty
    splits = tl.cdiv(N, span)
    problem = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    item, head = problem // heads, problem % heads
    first = split * span
    last = tl.minimum(first + span, N)
    keys += item * key_item + head * key_head + first.to(tl.int64) * key_row
    values += item * value_item + head * value_head + first.to(tl.int64) * value_row
    mask += item * mask_item

    columns = tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < M
    queries += item * query_item + head * query_head
    q = _load(queries, rows, exists, query_row, P, BLOCK_P, INTERPRETED)

    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    picked = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    for start in range(first, last, BLOCK_N):
        real = _real(mask, start, columns, last, MASKED)
        k = _load(keys, columns, real, key_row, P, BLOCK_P, INTERPRETED)
        v = k if SHARED else _load(values, columns, real, value_row, P, BLOCK_P, INTERPRETED)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (BLOCK_M, BLOCK_N)
        logits = tl.where(real[None, :], logits, -float("inf"))
        reference, highest, total, picked = _accumulate(highest, total, picked, tl.max(logits, 1))
        weights = tl.exp2(logits - (reference - _shift(dtype))[:, None])
        total += tl.sum(weights, 1)
        picked = tl.dot(_round(weights, dtype, INTERPRETED), v, picked, input_precision="ieee")
        keys += BLOCK_N * key_row
        values += BLOCK_N * value_row

    if WHOLE:
        picked, highest = _normalise(highest, total, picked, dtype)
    base = (problem * splits + split) * M
    tl.store(highest_out + base + rows, highest, mask=exists)
    if not WHOLE:
        tl.store(total_out + base + rows, total, mask=exists)
    _store(picked_out + base * P, rows, exists, P, picked, P, BLOCK_P, INTERPRETED)


@triton.jit
def merge(
    highest_in: tl.tensor,
    total_in: tl.tensor,
    picked_in: tl.tensor,
    picked_out: tl.tensor,
    lse_out: tl.tensor,
    dtype_of: tl.tensor,
    M: tl.tensor,
    splits: tl.tensor,
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """R and log-sum-exp from the splits of ``extract``, in their order; ``dtype_of`` has the keys' dtype."""
    dtype = dtype_of.dtype.element_ty
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = rows < M
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    picked = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    base = problem * splits * M
    for _ in range(splits):
        part_highest = tl.load(highest_in + base + rows, mask=exists, other=-float("inf"))
        part_total = tl.load(total_in + base + rows, mask=exists, other=0.0)
        part = _load(picked_in + base * P, rows, exists, P, P, BLOCK_P, INTERPRETED)
        reference, highest, total, picked = _accumulate(highest, total, picked, part_highest)
        weight = tl.exp2(part_highest - reference)
        total += weight * part_total
        picked += weight[:, None] * part
        base += M
    picked, lse = _normalise(highest, total, picked, dtype)
    tl.store(lse_out + problem * M + rows, lse, mask=exists)
    _store(picked_out + problem * M * P, rows, exists, P, picked, P, BLOCK_P, INTERPRETED)


@triton.jit
def broadcast(
    queries: tl.tensor,
    keys: tl.tensor,
    mask: tl.tensor,
    carried: tl.tensor,
    undo_carried: tl.tensor,
    lse: tl.tensor,
    output: tl.tensor,
    query_item: tl.tensor,
    query_head: tl.tensor,
    query_row: tl.tensor,
    key_item: tl.tensor,
    key_head: tl.tensor,
    key_row: tl.tensor,
    output_item: tl.tensor,
    output_head: tl.tensor,
    output_row: tl.tensor,
    mask_item: tl.tensor,
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
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """O = A^T kappa C for ``span`` tokens, over BLOCKS blocks of representatives.

    A is computed transposed, tokens as rows: it then is an operand of the product from registers.
    """
    dtype = keys.dtype.element_ty
    splits = tl.cdiv(N, span)
    problem = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    item, head = problem // heads, problem % heads
    first = split * span
    last = tl.minimum(first + span, N)
    keys += item * key_item + head * key_head + first.to(tl.int64) * key_row
    output += item * output_item + head * output_head + first.to(tl.int64) * output_row
    mask += item * mask_item
    queries += item * query_item + head * query_head
    carried += problem * M * P
    lse += problem * M
    undo = tl.load(undo_carried + problem) * tl.exp2(-_shift(dtype)) if dtype == tl.float16 else 1.0

    columns = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    exists = rows < M
    if BLOCKS == 1:
        q = _load(queries, rows, exists, query_row, P, BLOCK_P, INTERPRETED)
        c = _load(carried, rows, exists, P, P, BLOCK_P, INTERPRETED)
        reference = _load_lse(lse, rows, exists, dtype)
    for start in range(first, last, BLOCK_N):
        real = _real(mask, start, columns, last, MASKED)
        k = _load(keys, columns, real, key_row, P, BLOCK_P, INTERPRETED)
        o = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        for block in range(BLOCKS):
            if BLOCKS > 1:
                rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
                exists = rows < M
                q = _load(queries, rows, exists, query_row, P, BLOCK_P, INTERPRETED)
                c = _load(carried, rows, exists, P, P, BLOCK_P, INTERPRETED)
                reference = _load_lse(lse, rows, exists, dtype)
            logits = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # (BLOCK_N, BLOCK_M)
            a = _weights(logits, reference[None, :], real[:, None])
            o = tl.dot(_round(a, dtype, INTERPRETED), c, o, input_precision="ieee")
        if dtype == tl.float16:
            o *= undo
        _store(output, columns, start + columns < last, output_row, o, P, BLOCK_P, INTERPRETED)
        keys += BLOCK_N * key_row
        output += BLOCK_N * output_row
