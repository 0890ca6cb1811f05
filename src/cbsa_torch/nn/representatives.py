"""Strategies: where representatives come from. One small protocol, which your own may follow.

A strategy is called as ``strategy(tokens, grid_size, token_mask)`` with ``(B, H, N, P)`` tokens in the
subspaces and their ``(B, N)`` mask (None: all are real), and returns :class:`cbsa_torch.ops.Representatives`.
It is any function or module; attributes, False where it has none, say more about it:

- ``needs_grid``: it works on a grid. It is then given the grid tokens only, row-major, and their grid;
  otherwise all tokens, prefix tokens first, and None.
- ``takes_cells``: with ``needs_grid``, that it also works on tokens at coordinates. It is then given
  :class:`cbsa_torch.ops.Cells` in place of the grid, found for its attribute ``num_representatives``;
- ``takes_parallel``: that it also works on tokens that are spread over processes. It is then given all tokens
  of its rank, the grid or the cells of all ranks, and as keywords ``parallel`` and ``num_prefix_tokens``;
- ``gives_attention``: it returns the attention along with the representatives, so nothing is extracted.

A method ``counts(num_tokens, *, num_heads, head_dim)`` may say what it costs; otherwise it counts as free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbsa_torch._core.checks import check_choice, check_positive_int
from cbsa_torch._core.types import REPRESENTATIVE_KINDS, Cells, GridSize, Representatives, Strategy
from cbsa_torch.ops import counting
from cbsa_torch.ops.coordinates import pool_by_coordinates
from cbsa_torch.ops.directions import basis_directions, check_orthonormal, principal_directions
from cbsa_torch.ops.parallel import ContextParallel
from cbsa_torch.ops.pooling import check_num_representatives, pool_representatives

DEFAULT_NUMBER = 64
"""Representatives, where the caller does not say: an 8x8 grid (paper, section 3.2)."""


def make_representatives(
    kind: str | Strategy,
    num_heads: int,
    num_representatives: int | Sequence[int] | None,
    head_dim: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Strategy:
    """The strategy a mixer's ``representatives`` argument names, or the one that it is."""
    if isinstance(kind, type):
        raise TypeError(f"representatives must be an instance, got the class {kind.__name__}")
    if not callable(kind):
        try:
            check_choice("representatives", kind, REPRESENTATIVE_KINDS)
        except ValueError as error:
            raise ValueError(f"{error}; or pass a function or module of your own") from None
    if num_representatives is not None and kind not in ("pool", "learned"):
        raise ValueError(
            f"num_representatives is of representatives='pool' and 'learned'; {kind!r} has a number of its own"
        )
    if callable(kind):
        if getattr(kind, "needs_grid", False) and getattr(kind, "gives_attention", False):
            raise ValueError(
                "representatives cannot have both needs_grid and gives_attention: on a grid they see no prefix "
                "tokens, but an attention is over all tokens"
            )
        return kind
    number = DEFAULT_NUMBER if num_representatives is None else num_representatives
    if kind == "learned":
        if not isinstance(number, int):
            raise TypeError(
                "num_representatives must be an int for representatives='learned', which have no grid, "
                f"got {number!r} of type {type(number).__name__}"
            )
        return LearnedRepresentatives(num_heads, number, head_dim, device=device, dtype=dtype)
    if kind == "pool":
        return PooledRepresentatives(number)
    return {"tokens": AllTokens, "principal": PrincipalDirections, "basis": BasisDirections}[kind]()


class PooledRepresentatives(nn.Module):
    """Average pooling of the grid tokens: the paper's default, whose attention keeps its full rank.

    Args:
        num_representatives: the most representatives (the grid of cells is then the closest in aspect), or the
            cells along each axis, e.g. ``(8, 8)``; never more than there are tokens. See
            :func:`cbsa_torch.ops.representative_grid`.

    Attributes:
        num_representatives: as given, a sequence as a tuple.

    Examples:
        >>> from cbsa_torch.nn import PooledRepresentatives
        >>> PooledRepresentatives(64)(torch.randn(1, 2, 196, 8), (14, 14)).values.shape
        torch.Size([1, 2, 64, 8])
    """

    needs_grid = True
    takes_cells = True
    takes_parallel = True

    def __init__(self, num_representatives: int | Sequence[int] = 64) -> None:
        super().__init__()
        self.num_representatives = check_num_representatives(num_representatives)

    def forward(
        self,
        tokens: Tensor,
        grid_size: GridSize | Cells | None = None,
        token_mask: Tensor | None = None,
        *,
        parallel: ContextParallel | None = None,
        num_prefix_tokens: int = 0,
    ) -> Representatives:
        """Pool ``(B, H, N, P)`` tokens over their grid or cells; ``token_mask`` is ``(B, N)``."""
        spread: dict[str, Any] = {"parallel": parallel, "num_prefix_tokens": num_prefix_tokens}
        if isinstance(grid_size, Cells):
            return pool_by_coordinates(tokens, grid_size, **spread)
        if grid_size is None:
            raise ValueError("grid_size is required to pool representatives")
        number = self.num_representatives
        return pool_representatives(tokens, grid_size, number, token_mask=token_mask, **spread)

    def extra_repr(self) -> str:
        """Show the count or the grid when the module is printed."""
        return f"num_representatives={self.num_representatives}"


class LearnedRepresentatives(nn.Module):
    """Parameters, the same for every input: the paper's alternative, for tokens without a grid.

    Initialised with standard deviation P^-1/2. The paper found this form less accurate than pooling: its
    attention matrix collapses to a low rank (Appendix A).

    Examples:
        >>> from cbsa_torch.nn import LearnedRepresentatives
        >>> make = LearnedRepresentatives(num_heads=2, num_representatives=16, head_dim=8)
        >>> make(torch.randn(3, 2, 50, 8)).values.shape
        torch.Size([3, 2, 16, 8])
    """

    needs_grid = False
    takes_parallel = True

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
        self,
        tokens: Tensor,
        grid_size: GridSize | None = None,
        token_mask: Tensor | None = None,
        *,
        parallel: ContextParallel | None = None,
        num_prefix_tokens: int = 0,
    ) -> Representatives:
        """Repeat the parameters over the batch of ``tokens`` ``(B, H, N, P)``, in their dtype."""
        return Representatives(self.values.to(tokens.dtype).expand(tokens.shape[0], -1, -1, -1))

    def extra_repr(self) -> str:
        """Show the shape when the module is printed."""
        return f"shape={tuple(self.values.shape)}"


class AllTokens(nn.Module):
    """The tokens themselves, M = N with A = I: CBSA is then MSSA, softmax attention (Eq. 9).

    For comparison with :class:`cbsa_torch.MSSA`, which computes the same by fused kernels: this one forms
    matrices of N x N.

    Examples:
        >>> from cbsa_torch.nn import AllTokens
        >>> AllTokens()(torch.randn(1, 2, 50, 8)).attention.shape
        torch.Size([1, 2, 50, 50])
    """

    gives_attention = True

    def forward(
        self, tokens: Tensor, grid_size: GridSize | None = None, token_mask: Tensor | None = None
    ) -> Representatives:
        """Return ``(B, H, N, P)`` tokens, their mask, and the identity."""
        b, h, n, _ = tokens.shape
        identity = torch.eye(n, dtype=tokens.dtype, device=tokens.device).expand(b, h, n, n)
        return Representatives(tokens, token_mask, identity)


class PrincipalDirections(nn.Module):
    """Principal directions of the tokens: with the exact contraction, linear attention (Eq. 12).

    For comparison with :class:`cbsa_torch.LinearCBSA`, and without contraction. Its gradient exists where the
    P eigenvalues of a head's Gram matrix are distinct, hence only for N >= P. The signs of the directions are
    arbitrary, and the softmax contraction depends on them: a mixer refuses it.

    Examples:
        >>> from cbsa_torch.nn import PrincipalDirections
        >>> PrincipalDirections()(torch.randn(1, 2, 50, 8)).values.shape
        torch.Size([1, 2, 8, 8])
    """

    gives_attention = True

    def forward(
        self, tokens: Tensor, grid_size: GridSize | None = None, token_mask: Tensor | None = None
    ) -> Representatives:
        """:func:`cbsa_torch.ops.principal_directions`."""
        return principal_directions(tokens, token_mask=token_mask)

    def counts(self, num_tokens: int, *, num_heads: int, head_dim: int) -> counting.Counts:
        """What :meth:`forward` costs."""
        return counting.principal_directions(num_tokens, num_heads=num_heads, head_dim=head_dim)


class BasisDirections(nn.Module):
    """A fixed orthonormal basis: with the exact contraction, channel attention (Eq. 13).

    Args:
        basis: ``(P, P)`` or ``(H, P, P)``, orthonormal columns; kept as a buffer. Default: the identity.

    Examples:
        >>> from cbsa_torch.nn import BasisDirections
        >>> BasisDirections()(torch.randn(1, 2, 50, 8)).values.shape
        torch.Size([1, 2, 8, 8])
    """

    gives_attention = True

    def __init__(self, basis: Tensor | None = None) -> None:
        super().__init__()
        if basis is not None:
            check_orthonormal(basis)
            basis = basis.detach().clone()
        self.basis: Tensor | None
        self.register_buffer("basis", basis)

    def forward(
        self, tokens: Tensor, grid_size: GridSize | None = None, token_mask: Tensor | None = None
    ) -> Representatives:
        """:func:`cbsa_torch.ops.basis_directions`."""
        return basis_directions(tokens, self.basis, token_mask=token_mask)

    def counts(self, num_tokens: int, *, num_heads: int, head_dim: int) -> counting.Counts:
        """What :meth:`forward` costs."""
        return counting.basis_directions(num_tokens, num_heads=num_heads, head_dim=head_dim)
