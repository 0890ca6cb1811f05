"""CBSA in Triton: two reads of the tokens forward, two of the tokens and the gradient backward.

The same operator as ``tiled``, for CUDA devices (or, for tests, Triton's interpreter): the kernels take the
passes over tokens, torch the contraction of M x P representatives in between. Matrix products take operands
in the dtype of the keys and accumulate in float32, in which everything of size M x P is kept. Saved for
backward are the inputs, R and the log-sum-exp. One differentiation only.
"""

from __future__ import annotations

import importlib.util
import math
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cbsa_torch._core.precision import no_autocast
from cbsa_torch.ops.cbsa.contraction import contract, contract_backward, zero_rows
from cbsa_torch.ops.cbsa.differentiable import like_tokens, register

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128
MAX_REPRESENTATIVES = 256

SHORTEST_SPAN = 1024
"""Tokens below which a split costs more in partial results than it gains in parallel work."""
PROGRAMS_PER_PROCESSOR = 4
"""Enough programs per streaming multiprocessor to hide each other's latencies."""


@dataclass(frozen=True)
class Plan:
    """How the passes over tokens are cut into programs."""

    block_m: int
    """Representatives per block."""
    blocks: int
    """Blocks that cover all representatives."""
    block_n: int
    """Tokens per tile."""
    block_p: int
    """Head dimension, padded to a power of two of at least 16."""
    span: int
    """Tokens per program, a multiple of ``block_n``."""
    splits: int
    """Programs that share the tokens of one head and block."""
    warps: int
    """Warps per program."""


def plan(
    problems: int, m: int, n: int, p: int, dtype: torch.dtype, processors: int, gradients: bool = False
) -> Plan:
    """Choose block sizes and splits.

    Blocks are as large as registers allow, by what the compiler reports for compute capability 8.0 and 9.0;
    IEEE float32 products run without tensor cores and need the smaller ones. Tokens are split until the
    device is full, but not into pieces so short that partial results, M (P + 2) numbers each, weigh against
    the tokens themselves.

    Args:
        problems: B * H.
        m: representatives.
        n: tokens.
        p: head dimension.
        dtype: of the operands.
        processors: streaming multiprocessors of the device.
        gradients: for the last backward pass, which holds three times the operands and accumulators of others.
    """
    block_p = _padded(p)
    single = dtype == torch.float32
    large = block_p > 64
    most_m = {(False, False): 128, (False, True): 64, (True, False): 64, (True, True): 32}[single, large]
    block_n = 32 if single else 64
    if gradients:
        most_m = (32 if m > 32 else 16) if single else 64  # one float32 block of 32 alone would spill
        block_n //= 2 if large else 1
    block_m = min(_padded(m), most_m)
    blocks = -(-m // block_m)
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // max(1, problems * blocks))
    splits = max(1, min(wanted, n // SHORTEST_SPAN))
    span = -(-n // (splits * block_n)) * block_n
    warps = 4 if not single and not large and m <= 64 else 8
    return Plan(block_m, blocks, block_n, block_p, span, -(-n // span), warps)


def _padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def check_supported(keys: Tensor, m: int) -> None:
    """Raise unless the kernels can take ``keys`` ``(B, H, N, P)`` with ``m`` representatives."""
    p = keys.shape[-1]
    if keys.dtype not in DTYPES:
        raise TypeError(f"the Triton kernels take float32, float16 or bfloat16, got {keys.dtype}")
    if p > MAX_HEAD_DIM:
        raise ValueError(f"the Triton kernels take a head dimension of at most {MAX_HEAD_DIM}, got {p}")
    if m > MAX_REPRESENTATIVES:
        raise ValueError(f"the Triton kernels take at most {MAX_REPRESENTATIVES} representatives, got {m}")
    if importlib.util.find_spec("triton") is None:
        raise ImportError(
            "the Triton kernels need 'triton', which is not installed; PyTorch for CUDA brings it on Linux, "
            "elsewhere install it with: pip install triton"
        )
    if not keys.is_cuda and not _interpreted():
        raise ValueError(
            f"the Triton kernels need a CUDA device, got tensors on {keys.device}; "
            "set TRITON_INTERPRET=1 before the first use to run them in Triton's interpreter"
        )


def _kernels() -> ModuleType:
    """The kernels; imported at first use, for triton is optional."""
    from cbsa_torch.ops.cbsa import kernels

    return kernels


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were defined."""
    from triton.runtime.jit import JITFunction

    return not isinstance(_kernels().extract, JITFunction)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class _Passes:
    """The passes over the tokens of one problem, as launches."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor | None,
        mask: Tensor | None,
        scale: float,
        gradients: bool = False,
    ) -> None:
        b, h, n, p = keys.shape
        m = queries.shape[2]
        self.size = b, h, m, p
        self.dtype = keys.dtype
        self.device = keys.device
        self.queries, self.keys = _rows(queries), _rows(keys)
        self.values = None if values is None else _rows(values)
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self.plan = plan(b * h, m, n, p, keys.dtype, _processors(keys.device), gradients)
        self.programs = b * h * self.plan.splits
        self.blocks = {
            "P": p,
            "BLOCK_M": self.plan.block_m,
            "BLOCK_P": self.plan.block_p,
            "INTERPRETED": _interpreted(),
            "num_warps": self.plan.warps,
        }
        self.tokens = {
            "heads": h,
            "M": m,
            "N": n,
            "span": self.plan.span,
            "scale": scale * math.log2(math.e),
            "BLOCK_N": self.plan.block_n,
            "num_stages": 2,
            **self.blocks,
        }

    def _empty(self, *sizes: int) -> Tensor:
        return torch.empty(*self.size[:2], *sizes, dtype=torch.float32, device=self.device)

    def extract(self) -> tuple[Tensor, Tensor]:
        """R ``(B, H, M, P)`` and the log-sum-exp ``(B, H, M)``."""
        b, h, m, p = self.size
        splits, blocks = self.plan.splits, self.plan.blocks
        picked, highest = self._empty(splits, m, p), self._empty(splits, m)
        total = None if splits == 1 else self._empty(splits, m)
        _kernels().extract[self.programs, blocks](
            self.queries, self.keys, self.values, self.mask, picked, highest, total, **self.tokens
        )
        if total is None:
            return picked[:, :, 0], highest[:, :, 0]
        merged, lse = self._empty(m, p), self._empty(m)
        shift = 15.0 if self.dtype == torch.float16 else 0.0
        _kernels().merge[b * h, blocks](
            picked, highest, total, merged, lse, M=m, splits=splits, SHIFT=shift, **self.blocks
        )
        return merged, lse

    def broadcast(self, carried: Tensor, lse: Tensor, output: Tensor) -> None:
        """Write A^T ``carried``."""
        operand, undo = _operand(carried, self.dtype)
        _kernels().broadcast[self.programs,](
            self.queries,
            self.keys,
            self.mask,
            operand,
            undo,
            lse,
            _rows(output),
            BLOCKS=self.plan.blocks,
            **self.tokens,
        )

    def collect(self, gradient: Tensor, lse: Tensor) -> Tensor:
        """T = A dO, ``(B, H, M, P)``."""
        _, _, m, p = self.size
        collected = self._empty(self.plan.splits, m, p)
        _kernels().collect[self.programs, self.plan.blocks](
            self.queries, self.keys, _rows(gradient), self.mask, lse, collected, **self.tokens
        )
        return _summed(collected)

    def gradients(
        self,
        gradient: Tensor,
        lse: Tensor,
        carried: Tensor,
        d_picked: Tensor,
        collected: Tensor,
        picked: Tensor,
        d_keys: Tensor,
        d_values: Tensor | None,
    ) -> Tensor:
        """Write dK and dV (dK + dV without ``d_values``); return the logits' part of dQ ``(B, H, M, P)``."""
        _, _, m, p = self.size
        operand_c, undo_c = _operand(carried, self.dtype)
        operand_r, undo_r = _operand(d_picked, self.dtype)
        # D of the rounded operands: rows of dS then sum to zero better than with the exact ones
        row_sums = (_restored(operand_c, undo_c) * collected + _restored(operand_r, undo_r) * picked).sum(-1)
        d_queries = self._empty(self.plan.splits, m, p)

        def launch(to_tokens: bool, to_queries: bool, blocks: int) -> None:
            _kernels().gradients[self.programs, self.plan.blocks // blocks](
                self.queries,
                self.keys,
                self.values,
                _rows(gradient),
                self.mask,
                operand_c,
                undo_c,
                operand_r,
                undo_r,
                lse,
                row_sums,
                _rows(d_keys) if to_tokens else None,
                _rows(d_values) if to_tokens and d_values is not None else None,
                d_queries if to_queries else None,
                BLOCKS=blocks,
                **self.tokens,
            )

        if self.plan.blocks == 1 and self.dtype != torch.float32:
            launch(True, True, 1)
        else:  # both at once do not fit registers
            launch(True, False, self.plan.blocks)
            launch(False, True, 1)
        return _summed(d_queries)


def _unit_stride(rows: Tensor) -> Tensor:
    """The same rows with entries next to each other: kernels take any other stride."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _rows(rows: Tensor) -> tuple[Tensor, int, int, int]:
    return rows, rows.stride(0), rows.stride(1), rows.stride(2)


def _summed(partial: Tensor) -> Tensor:
    """``(B, H, splits, M, P)`` to ``(B, H, M, P)``."""
    return partial[:, :, 0] if partial.shape[2] == 1 else partial.sum(2)


def _operand(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """``rows`` ``(B, H, M, P)`` rounded to ``dtype``; in float16 times a power of two per head.

    The second result ``(B, H)`` undoes that factor, which puts the largest entry of a head into [2^13, 2^14).
    """
    if dtype != torch.float16:
        return rows.to(dtype).contiguous(), None
    exponent = torch.frexp(rows.abs().amax((2, 3))).exponent.clamp(-100, 100)  # (B, H)
    one = torch.ones_like(exponent, dtype=torch.float32)
    factor = torch.ldexp(one, 14 - exponent)
    return (rows * factor[:, :, None, None]).to(dtype).contiguous(), factor.reciprocal()


def _restored(operand: Tensor, undo: Tensor | None) -> Tensor:
    rows = operand.float()
    return rows if undo is None else rows * undo[:, :, None, None]


def _context(keys: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, and the device of ``keys`` current: Triton launches on the current one."""
    stack = ExitStack()
    stack.enter_context(no_autocast(keys))
    stack.enter_context(torch.cuda.device_of(keys))
    return stack


@torch.library.custom_op("cbsa_torch::fused", mutates_args=())
def fused(
    representatives: Tensor,
    keys: Tensor,
    values: Tensor | None,
    step_representatives: Tensor,
    step_tokens: Tensor,
    key_mask: Tensor | None,
    representative_mask: Tensor | None,
    contraction: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``(B, H, N, P)``, picked tokens R ``(B, H, M, P)`` and log-sum-exp ``(B, H, M)``.

    Arguments are those of :func:`cbsa_torch.ops.cbsa.tiled.tiled`.
    """
    check_supported(keys, representatives.shape[2])
    with _context(keys):
        queries = _unit_stride(zero_rows(representatives, representative_mask))
        values = None if values is None else _unit_stride(values)
        passes = _Passes(queries, _unit_stride(keys), values, key_mask, scale)
        picked, lse = passes.extract()
        eta, kappa = (s.float()[:, None, None] for s in (step_representatives, step_tokens))
        rep = zero_rows(queries.float() + eta * picked, representative_mask)
        carried = kappa * contract(rep, contraction, scale, eps, representative_mask)
        output = like_tokens(keys)
        passes.broadcast(carried, lse, output)
    return output, picked, lse


@torch.library.custom_op("cbsa_torch::fused_backward", mutates_args=())
def fused_backward(
    gradient: Tensor,
    representatives: Tensor,
    keys: Tensor,
    values: Tensor | None,
    step_representatives: Tensor,
    step_tokens: Tensor,
    key_mask: Tensor | None,
    representative_mask: Tensor | None,
    picked: Tensor,
    lse: Tensor,
    contraction: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of representatives, keys, values (empty if they are the keys), eta and kappa."""
    with _context(keys):
        queries = _unit_stride(zero_rows(representatives, representative_mask))
        gradient = _unit_stride(gradient)
        eta, kappa = (s.float()[:, None, None] for s in (step_representatives, step_tokens))
        rep = zero_rows(queries.float() + eta * picked, representative_mask)
        c = contract(rep, contraction, scale, eps, representative_mask)
        d_keys = like_tokens(keys)
        d_values = None
        if values is not None:
            values, d_values = _unit_stride(values), torch.empty_like(d_keys)

        problem = queries, _unit_stride(keys), values, key_mask, scale
        collected = _Passes(*problem).collect(gradient, lse)
        d_kappa = (collected * c).sum((0, 2, 3))
        d_rep = contract_backward(kappa * collected, rep, contraction, scale, eps, representative_mask)
        d_eta = (d_rep * picked).sum((0, 2, 3))
        d_queries = _Passes(*problem, gradients=True).gradients(
            gradient, lse, kappa * c, eta * d_rep, collected, picked, d_keys, d_values
        )
        d_representatives = zero_rows(d_rep + d_queries, representative_mask)
    return (
        d_representatives.to(representatives.dtype),
        d_keys,
        keys.new_empty(0) if d_values is None else d_values,
        d_eta.to(step_representatives.dtype),
        d_kappa.to(step_tokens.dtype),
    )


@fused.register_fake
def _(
    representatives: Tensor,
    keys: Tensor,
    values: Tensor | None,
    step_representatives: Tensor,
    step_tokens: Tensor,
    key_mask: Tensor | None,
    representative_mask: Tensor | None,
    contraction: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    picked = representatives.new_empty(representatives.shape, dtype=torch.float32)
    return like_tokens(keys), picked, picked.new_empty(picked.shape[:3])


@fused_backward.register_fake
def _(
    gradient: Tensor,
    representatives: Tensor,
    keys: Tensor,
    values: Tensor | None,
    step_representatives: Tensor,
    step_tokens: Tensor,
    key_mask: Tensor | None,
    representative_mask: Tensor | None,
    picked: Tensor,
    lse: Tensor,
    contraction: str,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        representatives.new_empty(representatives.shape),
        like_tokens(keys),
        keys.new_empty(0) if values is None else like_tokens(keys),
        step_representatives.new_empty(step_representatives.shape),
        step_tokens.new_empty(step_tokens.shape),
    )


register(fused, fused_backward)
