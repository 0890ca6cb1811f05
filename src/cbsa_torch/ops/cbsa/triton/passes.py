"""The passes over tokens as launches of Triton kernels, for CUDA devices (or, for tests, Triton's interpreter).

Matrix products take operands in the dtype of the keys and accumulate in float32, in which everything of size
M x P is kept. Forward the tokens are read twice, backward tokens and gradient twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from cbsa_torch.ops.cbsa.triton import kernels
from cbsa_torch.ops.cbsa.triton.limits import refusal

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
    """Raise unless the kernels can take ``keys`` ``(B, H, N, P)`` with ``m`` representatives, and run here."""
    if (refused := refusal(keys, m)) is not None:
        raise refused
    if not keys.is_cuda and not _interpreted():
        raise ValueError(
            f"impl='triton' needs a CUDA device, got tensors on {keys.device}; "
            "set TRITON_INTERPRET=1 before the first use to run in Triton's interpreter"
        )


def _interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were defined."""
    return not isinstance(kernels.extract, JITFunction)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class TritonPasses:
    """The passes over the tokens of all items, with the arguments and methods of ``Tiles``.

    The normalizer is the log-sum-exp of the logits. There is no output projection.
    """

    def __init__(
        self,
        representatives: Tensor,
        keys: Tensor,
        values: Tensor | None,
        mask: Tensor | None,
        scale: float,
        normalizer: Tensor | None = None,
    ) -> None:
        check_supported(keys, representatives.shape[2])
        b, h, n, p = keys.shape
        self.size = b, h, representatives.shape[2], n, p
        self.dtype = keys.dtype
        self.device = keys.device
        self.scale = scale
        self.representatives, self.keys = _rows(representatives.to(keys.dtype)), _rows(keys)
        self.values = None if values is None else _rows(values)
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self.lse = None if normalizer is None else normalizer[..., 0].contiguous()

    @staticmethod
    def groups(b: int, n: int) -> list[slice]:
        """All items together."""
        return [slice(0, b)] if b else []

    @staticmethod
    def normalizer_size(n: int) -> int:
        """One number, whatever N is."""
        return 1

    def _plan(self, gradients: bool = False) -> Plan:
        b, h, m, n, p = self.size
        return plan(b * h, m, n, p, self.dtype, _processors(self.device), gradients)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Launch on the device of the tokens: Triton takes the current one."""
        with torch.cuda.device_of(self.keys[0]):
            kernel[grid](*args, **options)

    def _over_tokens(self, kernel: Any, plan: Plan, blocks: int | None, *args: Any, **options: Any) -> None:
        """Launch a pass over the tokens, with ``blocks`` programs for the blocks of representatives, or one."""
        b, h, m, n, _ = self.size
        programs = b * h * plan.splits
        self._launch(
            kernel,
            (programs,) if blocks is None else (programs, blocks),
            *args,
            heads=h,
            M=m,
            N=n,
            span=plan.span,
            scale=self.scale * math.log2(math.e),
            BLOCK_N=plan.block_n,
            num_stages=2,
            **self._blocks(plan),
            **options,
        )

    def _blocks(self, plan: Plan) -> dict[str, Any]:
        return {
            "P": self.size[-1],
            "BLOCK_M": plan.block_m,
            "BLOCK_P": plan.block_p,
            "INTERPRETED": _interpreted(),
            "num_warps": plan.warps,
        }

    def _empty(self, *sizes: int) -> Tensor:
        return torch.empty(*self.size[:2], *sizes, dtype=torch.float32, device=self.device)

    def extract(self) -> tuple[Tensor, Tensor]:
        """R = A V ``(B, H, M, P)`` and the normalizer ``(B, H, M, 1)``."""
        b, h, m, _, p = self.size
        plan = self._plan()
        picked, highest = self._empty(plan.splits, m, p), self._empty(plan.splits, m)
        total = None if plan.splits == 1 else self._empty(plan.splits, m)
        inputs = self.representatives, self.keys, self.values, self.mask
        self._over_tokens(kernels.extract, plan, plan.blocks, *inputs, picked, highest, total)
        if total is None:
            picked, self.lse = picked[:, :, 0], highest[:, :, 0]
        else:
            partial = picked, highest, total
            picked, self.lse = self._empty(m, p), self._empty(m)
            shift = 15.0 if self.dtype == torch.float16 else 0.0
            options = {"M": m, "splits": plan.splits, "SHIFT": shift, **self._blocks(plan)}
            self._launch(kernels.merge, (b * h, plan.blocks), *partial, picked, self.lse, **options)
        return picked, self.lse[..., None]

    def broadcast(self, carried: Tensor, bias: Tensor | None, output: Tensor) -> None:
        """Write A^T ``carried``, which is kappa C ``(B, H, M, P)``, into ``output`` ``(B, H, N, P)``."""
        assert output.ndim == 4, "these passes take no output projection"
        operand, undo = _operand(carried, self.dtype)
        inputs = self.representatives, self.keys, self.mask, operand, undo, self.lse
        plan = self._plan()
        self._over_tokens(kernels.broadcast, plan, None, *inputs, _rows(output), BLOCKS=plan.blocks)

    def collect(self, gradient: Tensor) -> Tensor:
        """A dO, ``(B, H, M, P)``."""
        _, _, m, _, p = self.size
        plan = self._plan()
        collected = self._empty(plan.splits, m, p)
        inputs = self.representatives, self.keys, _rows(gradient), self.mask, self.lse
        self._over_tokens(kernels.collect, plan, plan.blocks, *inputs, collected)
        return _summed(collected)

    def differentiate(
        self,
        gradient: Tensor,
        *,
        carried: Tensor,
        collected: Tensor,
        d_picked: Tensor,
        picked: Tensor,
        d_keys: Tensor,
        d_values: Tensor | None,
    ) -> Tensor:
        """Write dK and dV; return the gradient of the representatives through A."""
        _, _, m, _, p = self.size
        plan = self._plan(gradients=True)
        operand_c, undo_c = _operand(carried, self.dtype)
        operand_r, undo_r = _operand(d_picked, self.dtype)
        # D of the rounded operands: rows of dS then sum to zero better than with the exact ones
        row_sums = (_restored(operand_c, undo_c) * collected + _restored(operand_r, undo_r) * picked).sum(-1)
        d_representatives = self._empty(plan.splits, m, p)
        inputs = (
            *(self.representatives, self.keys, self.values, _rows(gradient), self.mask),
            *(operand_c, undo_c, operand_r, undo_r, self.lse, row_sums),
        )
        to_tokens = _rows(d_keys), None if d_values is None else _rows(d_values)
        if plan.blocks == 1 and self.dtype != torch.float32:
            self._over_tokens(kernels.gradients, plan, 1, *inputs, *to_tokens, d_representatives, BLOCKS=1)
        else:  # both at once do not fit registers
            self._over_tokens(kernels.gradients, plan, 1, *inputs, *to_tokens, None, BLOCKS=plan.blocks)
            results = None, None, d_representatives
            self._over_tokens(kernels.gradients, plan, plan.blocks, *inputs, *results, BLOCKS=1)
        return _summed(d_representatives)


def _rows(rows: Tensor) -> tuple[Tensor, int, int, int]:
    """A tensor and its strides but the last, which must be 1; what is written to has it (``like_tokens``)."""
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
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
