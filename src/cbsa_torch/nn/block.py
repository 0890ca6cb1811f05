"""Transformer layers: the white-box one, and the usual one as its baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cbsa_torch._core.checks import check_choice, check_positive
from cbsa_torch._core.types import RESIDUALS, GridSize, Residual
from cbsa_torch.nn.drop_path import DropPath
from cbsa_torch.nn.ista import ISTA
from cbsa_torch.nn.packing import Packing
from cbsa_torch.ops.coordinates import Coordinates
from cbsa_torch.ops.parallel import ContextParallel


def residual_around(attn: nn.Module, residual: Residual | None) -> Residual:
    """What the update of a mixer is added to, by default (None) the norm if its ``step`` is certified.

    A module around a certified mixer has no such attribute, and counts as free.
    """
    if residual is None:
        return "norm" if getattr(attn, "step", None) == "certified" else "input"
    check_choice("residual", residual, RESIDUALS)
    return residual


class WhiteBoxBlock(nn.Module):
    """x <- x + attn(norm1(x)), compression; x <- ISTA(norm2(x)), sparsification (no residual around it).

    With ``residual="norm"`` the first is x <- norm1(x) + attn(norm1(x)): the step starts from the tokens that
    the layer sees, so that what a certified step guarantees of norm1(x) + attn(norm1(x)) holds for the tokens
    that the model goes on with.

    Args:
        dim: channels.
        attn: a token mixer such as :class:`cbsa_torch.CBSA`, called as ``attn(x, grid_size, token_mask)``.
        norm_layer: constructor of the two normalisation layers.
        residual: what the update is added to: ``"input"``, x, or ``"norm"``, norm1(x). Default: the norm if the
            step of ``attn`` is certified (its attribute ``step`` says so: give ``"norm"`` for a module around
            such a mixer), else the input.
        step_size, sparsity: of :class:`cbsa_torch.ISTA`.
        drop_path: probability, while training, that the mixer's update of an item is left out.
        device, dtype: of the parameters made here (not of ``attn``).

    Examples:
        >>> from cbsa_torch import CBSA
        >>> from cbsa_torch.nn import WhiteBoxBlock
        >>> block = WhiteBoxBlock(64, CBSA(64, 4, step="certified"))
        >>> block.residual, block(torch.randn(2, 65, 64)).shape
        ('norm', torch.Size([2, 65, 64]))
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        residual: Residual | None = None,
        step_size: float = 0.1,
        sparsity: float = 0.1,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.residual = residual_around(attn, residual)
        self.norm1 = norm_layer(dim, device=device, dtype=dtype)
        self.attn = attn
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim, device=device, dtype=dtype)
        self.ista = ISTA(dim, step_size=step_size, sparsity=sparsity, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        grid_size: GridSize | None = None,
        token_mask: Tensor | None = None,
        coords: Tensor | Coordinates | None = None,
        cu_seqlens: Tensor | Packing | None = None,
        parallel: ContextParallel | None = None,
    ) -> Tensor:
        """Transform ``(B, N, C)`` tokens, or packed ones; same shape. See :meth:`TokenMixer.forward`."""
        normed = self.norm1(x)
        places = _places(coords, cu_seqlens, parallel)
        x = self._add(
            x,
            normed,
            self.drop_path(self.attn(normed, grid_size, token_mask, **places), cu_seqlens, parallel),
        )
        del normed  # of long sequences, half of what would be held while ISTA runs
        return self._feed_forward(x)

    def apply_update(self, x: Tensor, normed: Tensor, update: Tensor) -> Tensor:
        """What :meth:`forward` makes of x, norm1(x) and attn(norm1(x))."""
        return self._feed_forward(self._add(x, normed, self.drop_path(update)))

    def _add(self, x: Tensor, normed: Tensor, update: Tensor) -> Tensor:
        return (normed if self.residual == "norm" else x) + update

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.ista(self.norm2(x))


class ResidualBlock(nn.Module):
    """The usual layer: x <- x + attn(norm1(x)); x <- x + mlp(norm2(x)), with GELU in the MLP.

    The update of a certified step is added to x, too: its guarantee is then of norm1(x) + attn(norm1(x)), which
    are not the tokens that the model goes on with.

    Args:
        dim: channels.
        attn: a token mixer such as :class:`cbsa_torch.nn.MHSA`, called as ``attn(x, grid_size, token_mask)``.
        mlp_ratio: hidden over outer channels of the MLP.
        norm_layer: constructor of the two normalisation layers.
        drop_path: probability, while training, that an update of an item is left out.
        device, dtype: of the parameters made here (not of ``attn``).

    Examples:
        >>> from cbsa_torch.nn import MHSA, ResidualBlock
        >>> ResidualBlock(64, MHSA(64, 4))(torch.randn(2, 65, 64)).shape
        torch.Size([2, 65, 64])
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("mlp_ratio", mlp_ratio)
        hidden = max(int(dim * mlp_ratio), 1)
        self.norm1 = norm_layer(dim, device=device, dtype=dtype)
        self.attn = attn
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm_layer(dim, device=device, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden, device=device, dtype=dtype),
            nn.GELU(),
            nn.Linear(hidden, dim, device=device, dtype=dtype),
        )

    def forward(
        self,
        x: Tensor,
        grid_size: GridSize | None = None,
        token_mask: Tensor | None = None,
        coords: Tensor | Coordinates | None = None,
        cu_seqlens: Tensor | Packing | None = None,
        parallel: ContextParallel | None = None,
    ) -> Tensor:
        """Transform ``(B, N, C)`` tokens, or packed ones; same shape. See :meth:`TokenMixer.forward`."""
        places = _places(coords, cu_seqlens, parallel)
        x = x + self.drop_path(self.attn(self.norm1(x), grid_size, token_mask, **places), cu_seqlens, parallel)
        return x + self.drop_path(self.mlp(self.norm2(x)), cu_seqlens, parallel)

    def apply_update(self, x: Tensor, normed: Tensor, update: Tensor) -> Tensor:
        """What :meth:`forward` makes of x, norm1(x) and attn(norm1(x))."""
        x = x + self.drop_path(update)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _places(
    coords: Tensor | Coordinates | None, cu_seqlens: Tensor | Packing | None, parallel: ContextParallel | None
) -> dict[str, Any]:
    """What a mixer is given besides; nothing that was not given, which another module may not take."""
    given = {"coords": coords, "cu_seqlens": cu_seqlens, "parallel": parallel}
    return {name: value for name, value in given.items() if value is not None}
