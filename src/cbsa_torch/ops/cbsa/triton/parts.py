"""What the Triton kernels share: addresses, masked loads, operands in their dtype, the online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def round_to(x: tl.tensor, dtype: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Float32 to an operand of ``dtype``, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = x.to(dtype)
    return x


@triton.jit
def _inside(keep: tl.tensor, P: tl.constexpr, BLOCK_P: tl.constexpr) -> tl.tensor:
    """Mask of what exists in rows ``keep``; one column wide if no column is padding."""
    inside = keep[:, None]
    if BLOCK_P > P:
        inside = inside & (tl.arange(0, BLOCK_P) < P)[None, :]
    return inside


@triton.jit
def load_rows(
    base: tl.tensor,
    rows: tl.tensor,
    keep: tl.tensor,
    stride: tl.tensor,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """``rows`` as ``(R, BLOCK_P)``, zero where ``keep`` is not set."""
    places = base + rows[:, None] * stride + tl.arange(0, BLOCK_P)[None, :]
    x = tl.load(places, mask=_inside(keep, P, BLOCK_P), other=0.0)
    if INTERPRETED and base.dtype.element_ty == tl.bfloat16:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(
    base: tl.tensor,
    rows: tl.tensor,
    keep: tl.tensor,
    stride: tl.tensor,
    x: tl.tensor,
    P: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Write rows ``(R, BLOCK_P)`` where ``keep`` is set."""
    places = base + rows[:, None] * stride + tl.arange(0, BLOCK_P)[None, :]
    tl.store(places, round_to(x, base.dtype.element_ty, INTERPRETED), mask=_inside(keep, P, BLOCK_P))


@triton.jit
def place(N: tl.tensor, span: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What falls to a program: problem (item and head), split, first token, and where they end."""
    splits = tl.cdiv(N, span)
    problem = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    first = split * span
    return problem, split, first, tl.minimum(first + span, N)


@triton.jit
def address(tensor: tl.tuple, problem: tl.tensor, heads: tl.tensor, row: tl.tensor) -> tl.tensor:
    """Where a row of a problem begins; ``row`` and ``problem`` are 64 bits wide, for tensors of any size."""
    base = tensor[0] + (problem // heads) * tensor[1] + (problem % heads) * tensor[2]
    return base + row * tensor[3]


@triton.jit
def real_tokens(mask: tl.tensor, tokens: tl.tensor, last: tl.tensor) -> tl.tensor:
    """Which of ``tokens`` count: those before ``last``, unless masked."""
    real = tokens < last
    if mask is not None:
        real = real & (tl.load(mask + tokens, mask=real, other=0) != 0)
    return real


@triton.jit
def advance_softmax(
    highest: tl.tensor, total: tl.tensor, picked: tl.tensor, newest: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Rescale an online softmax to the maximum with ``newest``; first, what weights are now relative to."""
    now = tl.maximum(highest, newest)
    reference = tl.where(now == -float("inf"), 0.0, now)  # a row that is masked so far
    decay = tl.exp2(highest - reference)
    return reference, now, total * decay, picked * decay[:, None]


@triton.jit
def finish_softmax(
    highest: tl.tensor, total: tl.tensor, picked: tl.tensor, SHIFT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """R and the natural log-sum-exp; 0 and +inf for a row without any token."""
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    lse = (highest + tl.log2(divisor) - SHIFT) * LN2
    return picked / divisor[:, None], tl.where(empty, float("inf"), lse)


@triton.jit
def load_lse(lse: tl.tensor, rows: tl.tensor, keep: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """Log-sum-exp in base 2, less the exponent A is shifted by; +inf, hence A = 0, in rows of padding."""
    return tl.load(lse + rows, mask=keep, other=float("inf")) * LOG2E - SHIFT


@triton.jit
def attention(logits: tl.tensor, lse: tl.tensor, real: tl.tensor) -> tl.tensor:
    """A (times 2^SHIFT); zero for tokens that do not count, whose logits may exceed any log-sum-exp."""
    return tl.exp2(tl.where(real, logits - lse, -float("inf")))


@triton.jit
def half_range(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Scale a tile by a power of two so that its largest entry is in [2^14, 2^15); and the inverse factor."""
    exponent = tl.max(tl.max(tl.abs(x), 1), 0).to(tl.int32, bitcast=True) & 0x7F800000
    power = exponent.to(tl.float32, bitcast=True)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    return x * inverse * 16384.0, power * (1.0 / 16384.0)
