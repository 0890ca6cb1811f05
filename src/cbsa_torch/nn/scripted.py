"""Layers as ``torch.jit.script`` compiles them: their equations, without what mixers read and check.

A layer gives its form by ``__prepare_scriptable__``, PyTorch's convention. A form holds the parameters and
modules of the layer that it stands for. It takes images, or tokens on a grid without masks, of any size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch.ops.ista import ista_equation
from cbsa_torch.ops.pooling import scripted_pool
from cbsa_torch.ops.tssa import MEMBERSHIP_FLOOR, NORM_FLOOR


def not_scriptable(layer: nn.Module, reason: str) -> TypeError:
    """The error of what TorchScript cannot compile."""
    return TypeError(
        f"torch.jit.script cannot compile {type(layer).__name__}: {reason}; use torch.export, torch.compile or "
        "torch.jit.trace"
    )


class ScriptedMixer(nn.Module):
    """A token mixer: its projections around one of the operators below.

    Args:
        mixer: the layer.
        operator: called as ``operator(queries, keys, values, grid_size)``.
    """

    def __init__(self, mixer: Any, operator: nn.Module) -> None:
        super().__init__()
        self.grid_size = mixer.grid_size
        self.shared, self.num_heads, self.head_dim = mixer.shared_qkv, mixer.num_heads, mixer.head_dim
        self.qkv, self.q_norm, self.k_norm = mixer.qkv, mixer.q_norm, mixer.k_norm
        self.operator = operator
        self.norm, self.proj_drop = mixer.norm, mixer.proj_drop
        self.proj = _TiedProjection(mixer.qkv) if mixer.proj is None else mixer.proj
        self.train(mixer.training)

    def forward(
        self,
        x: Tensor,
        grid_size: tuple[int, int] | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Mix ``(B, N, C)`` tokens, prefix tokens first."""
        if token_mask is not None:
            raise ValueError("token_mask must be None in TorchScript: compile the model for whole images")
        assert x.dim() == 3, "x must be (B, N, C) tokens in TorchScript"
        if grid_size is None:
            grid_size = self.grid_size
        b, n = x.shape[0], x.shape[1]
        projected = self.qkv(x)
        if self.shared:
            queries = projected.view(b, n, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, N, P)
            keys = queries
            values = queries
        else:
            parts = projected.view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            queries, keys, values = self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]
        mixed = self.operator(queries, keys, values, grid_size)
        return self.proj_drop(self.proj(self.norm(mixed.transpose(1, 2).flatten(2))))


class _TiedProjection(nn.Module):
    """Out of the subspaces by the transpose of the projection into them."""

    def __init__(self, qkv: nn.Linear) -> None:
        super().__init__()
        self.qkv = qkv

    def forward(self, joined: Tensor) -> Tensor:
        """Project."""
        return F.linear(joined, self.qkv.weight.t())


class ScriptedSoftmaxAttention(nn.Module):
    """:func:`cbsa_torch.ops.softmax_attention`, the operator of MSSA and MHSA."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, grid_size: tuple[int, int] | None
    ) -> Tensor:
        """Attend."""
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)


class ScriptedTSSA(nn.Module):
    """:func:`cbsa_torch.ops.tssa`."""

    def __init__(self, temperature: nn.Parameter) -> None:
        super().__init__()
        self.temperature = temperature
        self.norm_floor, self.membership_floor = NORM_FLOOR, MEMBERSHIP_FLOOR  # TorchScript reads no globals

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, grid_size: tuple[int, int] | None
    ) -> Tensor:
        """Scale channels by their moments."""
        w = queries.to(torch.promote_types(queries.dtype, torch.float32))
        squares = w.square()
        share = squares / squares.sum(-2, keepdim=True).clamp(min=self.norm_floor**2)
        membership = torch.softmax(self.temperature.to(w.dtype)[:, None] * share.sum(-1), dim=1)  # (B, H, N)
        weights = membership / (membership.sum(-1, keepdim=True) + self.membership_floor)
        moment = weights[:, :, None, :] @ squares  # (B, H, 1, P)
        return (-w * membership[..., None] / (1 + moment)).to(queries.dtype)


class ScriptedLinearCBSA(nn.Module):
    """:func:`cbsa_torch.ops.linear_cbsa`, solved by Cholesky, times the step."""

    def __init__(self, step_tokens: nn.Parameter, eps: float, average: bool) -> None:
        super().__init__()
        self.step_tokens, self.eps, self.average = step_tokens, eps, average

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, grid_size: tuple[int, int] | None
    ) -> Tensor:
        """Filter the spectrum."""
        w = queries.to(torch.float64)
        gram = w.mT @ w / self.eps**2  # (B, H, P, P)
        if self.average:
            gram = gram / queries.shape[2]
        identity = torch.eye(gram.shape[-1], dtype=w.dtype, device=w.device)
        factor, failed = torch.linalg.cholesky_ex(identity + gram)
        kernel = torch.cholesky_solve(identity.expand_as(gram), factor)
        kernel = kernel.masked_fill((failed != 0)[..., None, None], float("nan"))
        return self.step_tokens[:, None, None] * (w @ kernel).to(queries.dtype)


class ScriptedRepresentatives(nn.Module):
    """Initial guesses, pooled over the grid or learned.

    Args:
        learned: ``(H, M, P)``, or None to pool.
        limit: of the number of pooled ones; 0: there are as many as cells.
        cells: the grid of pooled ones, if there is no limit.
        skips_prefix: whether pooling begins after the prefix tokens.
    """

    def __init__(
        self, learned: nn.Parameter | None, limit: int, cells: tuple[int, int], skips_prefix: bool
    ) -> None:
        super().__init__()
        self.learned, self.limit, self.cells, self.skips_prefix = learned, limit, cells, skips_prefix

    def forward(self, tokens: Tensor, grid_size: tuple[int, int] | None) -> Tensor:
        """``(B, H, N, P)`` to ``(B, H, M, P)``."""
        learned = self.learned
        if learned is not None:
            return learned.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1)
        assert grid_size is not None, "grid_size is needed to pool representatives"
        first = tokens.shape[2] - grid_size[0] * grid_size[1] if self.skips_prefix else 0
        return scripted_pool(tokens, first, grid_size, self.limit, self.cells)


class ScriptedAgents(nn.Module):
    """:func:`cbsa_torch.ops.agent_attention`."""

    def __init__(self, representatives: ScriptedRepresentatives) -> None:
        super().__init__()
        self.representatives = representatives

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, grid_size: tuple[int, int] | None
    ) -> Tensor:
        """Attend through the agents."""
        agents = self.representatives(queries, grid_size)
        collected = F.scaled_dot_product_attention(agents, keys, values)
        return F.scaled_dot_product_attention(queries, agents, collected)


class ScriptedCBSA(nn.Module):
    """:func:`cbsa_torch.ops.cbsa` with one attention matrix: Eq. 5, 7 or 8, and the broadcast.

    Args:
        representatives: initial guesses.
        step_tokens, step_representatives: kappa and eta, ``(H,)``.
        contraction, eps: as of the layer.
        relative: whether kappa is in units of tokens per representative.
    """

    def __init__(
        self,
        representatives: ScriptedRepresentatives,
        step_tokens: nn.Parameter,
        step_representatives: nn.Parameter,
        contraction: str,
        eps: float,
        relative: bool,
    ) -> None:
        super().__init__()
        self.representatives = representatives
        self.step_tokens, self.step_representatives = step_tokens, step_representatives
        self.contraction, self.eps, self.relative = contraction, eps, relative

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, grid_size: tuple[int, int] | None
    ) -> Tensor:
        """Extract, contract, broadcast."""
        dtype = torch.promote_types(queries.dtype, torch.float32)
        scale = queries.shape[-1] ** -0.5
        guess = self.representatives(queries, grid_size).to(dtype)
        keys, values = keys.to(dtype), values.to(dtype)
        attention = torch.softmax((scale * guess) @ keys.mT, dim=-1)  # (B, H, M, N)
        extracted = guess + self.step_representatives.to(dtype)[:, None, None] * (attention @ values)
        contracted = extracted
        if self.contraction == "exact":
            contracted = _contract_exactly(extracted, self.eps)
        elif self.contraction == "softmax":
            contracted = torch.softmax((scale * extracted) @ extracted.mT, dim=-1) @ extracted
        step = self.step_tokens.to(dtype)[:, None, None]
        if self.relative:
            step = step * (keys.shape[2] / guess.shape[2])
        return (attention.mT @ (step * contracted)).to(queries.dtype)


def _contract_exactly(rep: Tensor, eps: float) -> Tensor:
    """Eq. 7, solved as :func:`cbsa_torch.ops.cbsa.reference.contract_exact` does."""
    m, p = rep.shape[2], rep.shape[3]
    rows = (rep if m < p else rep.mT).to(torch.float64)  # the shorter side first
    gram = p / (m * eps**2) * (rows @ rows.mT)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(identity + gram)
    factor = factor.masked_fill((failed != 0)[..., None, None], float("nan"))
    solved = torch.cholesky_solve(rows, factor).to(rep.dtype)
    return solved if m < p else solved.mT


class ScriptedISTA(nn.Module):
    """:func:`cbsa_torch.ops.ista_step` by its two products."""

    def __init__(self, weight: nn.Parameter, step_size: float, sparsity: float) -> None:
        super().__init__()
        self.weight, self.step_size, self.sparsity = weight, step_size, sparsity

    def forward(self, x: Tensor) -> Tensor:
        """Code tokens."""
        return ista_equation(x, self.weight, self.step_size, self.sparsity)


class ScriptedFusedISTA(nn.Module):
    """:func:`cbsa_torch.ops.ista_step` by its matrix."""

    def __init__(self, matrix: Tensor, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Code tokens."""
        return F.relu(x + F.linear(x, self.matrix) - self.threshold)  # type: ignore[arg-type]


class ScriptedLinearStem(nn.Module):
    """:class:`cbsa_torch.nn.LinearStem`."""

    def __init__(self, stem: Any) -> None:
        super().__init__()
        self.patch_size = stem.patch_size
        self.norm1, self.proj, self.norm2 = stem.norm1, stem.proj, stem.norm2

    def forward(self, x: Tensor) -> Tensor:
        """Embed images."""
        p = self.patch_size
        b, c, height, width = x.shape
        assert height % p + width % p == 0, "images must have sides that are multiples of patch_size"
        x = x.reshape(b, c, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1).flatten(3)
        return self.norm2(self.proj(self.norm1(x))).permute(0, 3, 1, 2)
