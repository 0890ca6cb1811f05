"""Where initial representatives come from: pooled tokens or learned parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cbsa_torch._core.checks import check_positive_int
from cbsa_torch._core.types import GridSize, Representatives
from cbsa_torch.ops.representatives import pool_representatives


class PooledRepresentatives(nn.Module):
    """Average pooling of the grid tokens: the paper's default, whose attention keeps its full rank.

    Args:
        num_representatives: the most representatives; never more than there are tokens.
    """

    needs_grid = True

    def __init__(self, num_representatives: int = 64) -> None:
        super().__init__()
        check_positive_int("num_representatives", num_representatives)
        self.num_representatives = num_representatives

    def forward(
        self, tokens: Tensor, grid_size: GridSize | None = None, token_mask: Tensor | None = None
    ) -> Representatives:
        """Pool ``(B, H, N, P)`` grid tokens; ``token_mask`` is ``(B, N)``."""
        if grid_size is None:
            raise ValueError("grid_size is required to pool representatives")
        return pool_representatives(tokens, grid_size, self.num_representatives, token_mask=token_mask)

    def extra_repr(self) -> str:
        """Show the count when the module is printed."""
        return f"num_representatives={self.num_representatives}"


class LearnedRepresentatives(nn.Module):
    """Parameters, the same for every input: the paper's alternative, for tokens without a grid.

    Initialised with standard deviation P^-1/2. The paper found this form less accurate than pooling: its
    attention matrix collapses to a low rank (Appendix A).
    """

    needs_grid = False

    def __init__(
        self,
        num_heads: int,
        num_representatives: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("num_heads", num_heads)
        check_positive_int("num_representatives", num_representatives)
        check_positive_int("head_dim", head_dim)
        self.values = nn.Parameter(
            torch.empty(num_heads, num_representatives, head_dim, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        nn.init.normal_(self.values, std=self.values.shape[-1] ** -0.5)

    def forward(
        self, tokens: Tensor, grid_size: GridSize | None = None, token_mask: Tensor | None = None
    ) -> Representatives:
        """Repeat the parameters over the batch of ``tokens`` ``(B, H, N, P)``, in their dtype."""
        return Representatives(self.values.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1), None)

    def extra_repr(self) -> str:
        """Show the shape when the module is printed."""
        return f"shape={tuple(self.values.shape)}"
