"""Names for option values and for results that several modules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

Contraction = Literal["softmax", "exact", "none"]
Broadcast = Literal["shared", "softmax"]
Impl = Literal["auto", "eager", "tiled", "triton"]
Layout = Literal["standard", "official"]
RepresentativeKind = Literal["pool", "learned", "tokens", "principal", "basis"]
QKV = Literal["shared", "separate"]
Step = Literal["free", "relative", "certified"]
Residual = Literal["input", "norm"]
LinearSolver = Literal["cholesky", "eigh"]
TSSAForm = Literal["tost", "channel"]

CONTRACTIONS: tuple[str, ...] = get_args(Contraction)
BROADCASTS: tuple[str, ...] = get_args(Broadcast)
IMPLS: tuple[str, ...] = get_args(Impl)
LAYOUTS: tuple[str, ...] = get_args(Layout)
REPRESENTATIVE_KINDS: tuple[str, ...] = get_args(RepresentativeKind)
QKVS: tuple[str, ...] = get_args(QKV)
STEPS: tuple[str, ...] = get_args(Step)
RESIDUALS: tuple[str, ...] = get_args(Residual)
LINEAR_SOLVERS: tuple[str, ...] = get_args(LinearSolver)
TSSA_FORMS: tuple[str, ...] = get_args(TSSAForm)

GridSize = tuple[int, ...]

DEFAULT_EPS = 0.1
"""Quantisation precision epsilon: epsilon^2 = 0.01, the value behind the official rate measurements."""


class GridPooling(NamedTuple):
    """Average pooling of a grid of tokens into a grid of cells: a matrix that is not written out.

    Examples:
        >>> from cbsa_torch.ops import pool_representatives
        >>> pool_representatives(torch.randn(1, 2, 196, 8), (14, 14), 64).token_weights
        GridPooling(grid_size=(14, 14), cells=(8, 8), first=0)
    """

    grid_size: GridSize
    cells: GridSize
    first: int = 0
    """Tokens before the grid."""


class Cells(NamedTuple):
    """Which cell of a coarse lattice every token is in; only cells that hold a token, in row-major order.

    Made by ``ops.find_cells``.

    Examples:
        >>> from cbsa_torch.ops import find_cells
        >>> cells = find_cells(torch.tensor([[[0.0], [0.1], [1.0]]]), 2)
        >>> cells.counts, cells.mask
        (tensor([[2, 1]]), tensor([[True, True]]))
    """

    cell: Tensor
    """``(B, N)`` int64, the cell of each token: 0 to M - 1, or M for a masked token, which is in none."""
    counts: Tensor
    """``(B, M)`` int64, the real tokens in each cell; 0 at the end, where an item has fewer cells."""
    order: Tensor
    """``(B, N)`` int64, the tokens sorted by cell, those of one cell in their order."""

    @property
    def mask(self) -> Tensor:
        """``(B, M)`` bool, True = a cell that exists for this item."""
        return self.counts > 0


class CellPooling(NamedTuple):
    """Means of the tokens in cells: a matrix with one entry for each token, that is not written out.

    Examples:
        >>> from cbsa_torch.ops import pool_by_coordinates
        >>> guess = pool_by_coordinates(torch.randn(1, 2, 50, 8), torch.rand(1, 50, 2), 16)
        >>> type(guess.token_weights).__name__, guess.token_weights.first
        ('CellPooling', 0)
    """

    cells: Cells
    first: int = 0
    """Tokens before those with a cell."""


class Representatives(NamedTuple):
    """What a strategy returns: an initial guess to extract from, or the representatives themselves.

    Examples:
        >>> from cbsa_torch.ops import Representatives
        >>> constant = Representatives(torch.zeros(1, 4, 16, 8))  # what a strategy of your own may return
        >>> constant.mask is None
        True
    """

    values: Tensor
    """``(B, H, M, P)`` Q_ini, or U_k^T Q if ``attention`` says how tokens make them up."""
    mask: Tensor | None = None
    """``(B, M)`` bool, True = a representative that exists; None if all do."""
    attention: Tensor | None = None
    """``(B, H, M, N)`` A^T over all N tokens, in place of the softmax of Eq. 5; None to extract by it."""
    token_weights: Tensor | GridPooling | CellPooling | None = None
    """Pi, how an initial guess is made of the N tokens that the strategy was given: ``values`` is Pi tokens
    plus what does not depend on them. ``(M, N)`` or ``(B, M, N)``, or a pooling; None: not told. The
    certified step gives C back to the tokens by its transpose."""


Strategy = Callable[[Tensor, Any, "Tensor | None"], Representatives]
"""What makes representatives: ``(tokens, grid_size, token_mask)``, or with ``Cells`` for a grid; see
:mod:`cbsa_torch.nn.representatives`."""


class CBSAStages(NamedTuple):
    """Every intermediate of one CBSA evaluation, in the order it is computed.

    Shapes: B batch, H heads, M representatives, N tokens (keys), P head dimension.

    Examples:
        >>> from cbsa_torch import CBSA
        >>> stages = CBSA(64, 4, num_representatives=16).stages(torch.randn(2, 64, 8, 8))
        >>> stages.attention.shape, stages.extracted.shape, stages.output.shape
        (torch.Size([2, 4, 16, 64]), torch.Size([2, 4, 16, 16]), torch.Size([2, 4, 64, 16]))
    """

    tokens: Tensor
    """``(B, H, N, P)`` the tokens in each subspace, U_k^T Z (the queries, if keys are given separately)."""
    representatives: Tensor
    """``(B, H, M, P)`` the initial guess Q_ini."""
    attention: Tensor
    """``(B, H, M, N)`` A^T of Eq. 5: each row is a softmax over the keys (N of them, the tokens unless keys
    are given separately), or zero for a representative that does not exist; or the one that was given."""
    extracted: Tensor
    """``(B, H, M, P)`` Q_ini + step_representatives * A^T values: the representatives of Eq. 5. If A was
    given, the representatives that came with it."""
    contraction_attention: Tensor | None
    """``(B, H, M, M)`` softmax attention among representatives (Eq. 8); None for other contractions."""
    contracted: Tensor
    """``(B, H, M, P)`` C: the representatives after Eq. 7 or Eq. 8."""
    broadcast_attention: Tensor
    """``(B, H, N, M)`` the weights that carry contractions back to tokens: A, or a fresh softmax; of the
    certified step B, all weights by which tokens make up the representatives."""
    output: Tensor
    """``(B, H, N, P)`` the operator's value, step * broadcast_attention @ contracted."""
    step: Tensor
    """``(B, H)`` kappa, the same for every item unless the step is certified; that one is negative."""
    representative_mask: Tensor | None = None
    """``(B, M)`` bool, True = a representative that exists for this item; None if all do."""
