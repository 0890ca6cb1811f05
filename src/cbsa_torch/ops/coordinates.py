"""Initial representatives of tokens at coordinates: means over the occupied cells of a coarse lattice.

Finding the cells depends on data and has no gradient. Pooling is a sparse product with one weight for each
token; sums go in the order of the tokens, so that results are the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.autodiff import is_transformed
from cbsa_torch._core.checks import check_device, check_floating, check_mask
from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch._core.types import CellPooling, Cells, GridSize, Representatives
from cbsa_torch.ops.lattice import LARGEST, cell_numbers, fixed_lattices, locate, search_lattices
from cbsa_torch.ops.parallel import ContextParallel, total
from cbsa_torch.ops.pooling import check_num_representatives


def find_cells(
    coords: Tensor, num_representatives: int | Sequence[int], *, token_mask: Tensor | None = None
) -> Cells:
    """Lay a coarse lattice over tokens at coordinates, and find which of its cells hold tokens.

    The lattice divides the bounding box of each item's real tokens into equal cells. For a number M it is as
    fine as at most M occupied cells allow: for a budget of cells, the rule of :func:`representative_grid` gives
    a lattice for the sides of the box; budgets are M, 2 M, 4 M, ... while at most M cells are occupied (until
    all distinct coordinates are apart, or 2^50), then 10 bisections look for the largest that still fits. A
    tuple is that lattice. An axis along which all coordinates are equal has one cell.

    So grids give what grid pooling would where their sides are multiples of the cells. Shifts, positive factors
    for all axes, and other units change nothing but by rounding; permuted tokens are permuted.

    Args:
        coords: ``(B, N, k)``, k = 1, 2 or 3, any integer or floating-point dtype and unit, axes in the order of
            the cells: ``(y, x)`` for those of an image. Integers at most 2^53 apart are exact.
        num_representatives: M, or the cells along each axis.
        token_mask: ``(B, N)`` bool, True = a real token. The others may have any coordinates, NaN included.

    Returns:
        :class:`Cells`, of which there are min(M, N), at least 1, for every item, those that do not exist last.

    Raises:
        ValueError: another shape, NaN or infinity, counts below 1. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import find_cells
        >>> cells = find_cells(torch.tensor([[[0, 0], [0, 1], [9, 9]]]), 2)
        >>> cells.cell, cells.counts
        (tensor([[0, 0, 1]]), tensor([[2, 1]]))
    """
    check_coords(coords)
    number = check_num_representatives(num_representatives)
    if not isinstance(number, int) and len(number) != coords.shape[2]:
        raise ValueError(
            "num_representatives must be an int or have one entry for each coordinate, "
            f"got {num_representatives!r} for coords of shape {tuple(coords.shape)}"
        )
    if token_mask is not None and coords.shape[1]:
        check_mask("token_mask", token_mask, coords.shape[:2], "(B, N)", "a real token", ("coords", coords))
    sides = [number] if isinstance(number, int) else list(number)
    if math.prod(sides) > LARGEST:
        raise ValueError(f"num_representatives must be at most 2^50 cells, got {num_representatives!r}")
    find = _find if is_transformed() else _find_op
    return Cells(*find(coords.detach(), token_mask, sides, not isinstance(number, int)))


def place_in_box(coords: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """Coordinates from the corner of the bounding box of each item's real tokens, in its longest side.

    Args:
        coords, token_mask: as for :func:`find_cells`.

    Returns:
        ``(B, N, k)`` float32 from 0 to 1, of integers as exact as of small ones; anything for masked tokens.
        No gradient.

    Raises:
        ValueError: another shape, NaN or infinity. TypeError: wrong dtypes.
    """
    check_coords(coords)
    place = _place if is_transformed() else _place_op
    return place(coords.detach(), token_mask)


def pool_by_coordinates(
    tokens: Tensor,
    coords: Tensor | Cells,
    num_representatives: int | Sequence[int] | None = None,
    *,
    token_mask: Tensor | None = None,
    parallel: ContextParallel | None = None,
    num_prefix_tokens: int = 0,
) -> Representatives:
    """Average tokens over the occupied cells of a coarse lattice into initial representatives Q_ini.

    Args:
        tokens: ``(B, H, N, P)`` tokens that have coordinates (no prefix tokens).
        coords: ``(B, N, k)`` as for :func:`find_cells`, or what that returned for them: then without
            ``num_representatives`` and ``token_mask``, which it knows.
        num_representatives: the most representatives to make, or the cells along each axis of the lattice; None
            beside cells.
        token_mask: ``(B, N)`` bool, True = a real token.
        parallel: which tokens these are, if others are on other ranks: ``tokens`` are then all of this rank,
            and ``coords`` the cells of the tokens of all ranks. Every rank gets the same representatives.
        num_prefix_tokens: tokens before those with coordinates; with ``parallel`` only.

    Returns:
        :class:`Representatives`: values ``(B, H, M, P)``, which of them exist ``(B, M)``, and the weights of
        the tokens in them. Differentiable in the tokens any number of times, and the same on every run (but
        under ``torch.func`` and in exported programs on CUDA, where sums have no order).

    Raises:
        ValueError: shapes, counts, devices or coordinates that do not fit. TypeError: wrong dtypes.

    Examples:
        >>> from cbsa_torch.ops import pool_by_coordinates
        >>> coords = torch.tensor([[[0, 0], [0, 1], [9, 9]]])
        >>> pool_by_coordinates(torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1), coords, 2).values.flatten()
        tensor([2., 5.])
    """
    check_floating("tokens", tokens)
    if tokens.ndim != 4:
        raise ValueError(f"tokens must have shape (B, H, N, P), got {tuple(tokens.shape)}")
    b, h, n, p = tokens.shape
    if isinstance(coords, Cells):
        if num_representatives is not None or token_mask is not None:
            raise ValueError("num_representatives and token_mask cannot be given beside cells, which know them")
        cells = coords
    elif num_representatives is None:
        raise ValueError("num_representatives is required with coords that are a tensor")
    else:
        cells = find_cells(coords, num_representatives, token_mask=token_mask)
    if parallel is not None:
        return _pool_slice(tokens, cells, num_prefix_tokens, parallel)
    if tuple(cells.cell.shape) != (b, n):
        raise ValueError(
            f"coords must be of the {n} tokens of {b} items, got those of {tuple(cells.cell.shape)} (B, N)"
        )
    check_device("coords", cells.cell, "tokens", tokens)
    rows = tokens.transpose(1, 2).reshape(b, n, h * p)
    values = mean_of_cells(rows, cells).view(b, cells.counts.shape[1], h, p).transpose(1, 2)
    return Representatives(values, cells.mask, token_weights=CellPooling(cells))


def _pool_slice(tokens: Tensor, cells: Cells, first: int, parallel: ContextParallel) -> Representatives:
    """Pooling of the tokens of all ranks: each adds what its own are of every mean."""
    b, h, n, p = tokens.shape
    parallel.check("tokens", n)
    if tuple(cells.cell.shape) != (b, parallel.num_tokens - first):
        raise ValueError(
            f"coords must be cells of the {parallel.num_tokens - first} tokens of all ranks after {first} "
            f"prefix tokens, for {b} items, got those of {tuple(cells.cell.shape)} (B, N)"
        )
    m, start = cells.counts.shape[1], parallel.start - first
    before = min(n, max(0, -start))  # prefix tokens here
    index = cells.cell[:, max(0, start) : start + n] if start + n > 0 else cells.cell[:, :0]
    counts = cells.counts.new_zeros(b, m + 1).scatter_add(1, index, torch.ones_like(index))[:, :m]
    own = Cells(index, counts, index.argsort(dim=1, stable=True))
    with no_autocast(tokens):
        rows = tokens[:, :, before:].transpose(1, 2).reshape(b, n - before, h * p)
        means = mean_of_cells(rows.to(compute_dtype(rows.dtype)), own)
        share = counts.to(means.dtype) / cells.counts.clamp(min=1)
        values = total(means * share[..., None], parallel.group)
        member = (index[:, None] == torch.arange(m, device=index.device)[:, None]).to(means.dtype)
        weights = F.pad(member / cells.counts.clamp(min=1)[..., None].to(means.dtype), (before, 0))
    values = values.to(tokens.dtype).view(b, m, h, p).transpose(1, 2)
    return Representatives(values, cells.mask, token_weights=weights)


def check_coords(coords: Tensor) -> None:
    """Raise unless ``coords`` is ``(B, N, k)`` with k = 1, 2 or 3, of real numbers."""
    if not isinstance(coords, Tensor):
        raise TypeError(f"coords must be a torch.Tensor, got {type(coords).__name__}")
    if coords.dtype not in _NUMBERS:
        raise TypeError(f"coords must have an integer or floating-point dtype, got {coords.dtype}")
    if coords.is_nested:
        raise ValueError("coords must be a dense tensor for a batch; nested ones are of packed sequences")
    if coords.ndim != 3 or not 1 <= coords.shape[2] <= 3:
        raise ValueError(f"coords must have shape (B, N, k), k = 1, 2 or 3, got {tuple(coords.shape)}")


_NUMBERS = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}


def mean_of_cells(rows: Tensor, cells: Cells) -> Tensor:
    """The mean ``(B, M, C)`` of the rows ``(B, N, C)`` in each cell, zero for one that does not exist."""
    pool = _mean if _by_plain_operations() else _mean_op
    with no_autocast(rows):
        return pool(rows.to(compute_dtype(rows.dtype)), *cells).to(rows.dtype)


def spread_from_cells(rows: Tensor, cells: Cells) -> Tensor:
    """The transpose of :func:`mean_of_cells`: each token ``(B, N, C)`` gets a share of its cell."""
    spread = _spread if _by_plain_operations() else _spread_op
    with no_autocast(rows):
        return spread(rows.to(compute_dtype(rows.dtype)), *cells).to(rows.dtype)


def _by_plain_operations() -> bool:
    """Where operators of our own are not seen (``torch.func``) or not wanted (``torch.export``)."""
    return is_transformed() or torch.compiler.is_exporting()


def _mean(rows: Tensor, index: Tensor, counts: Tensor, order: Tensor) -> Tensor:
    """Means by operations that can be transformed; on CUDA the order of their sums is not fixed."""
    b, m = counts.shape
    clean = rows.masked_fill((index == m)[..., None], 0.0)
    sums = rows.new_zeros(b, m + 1, rows.shape[2])
    sums = sums.scatter_add(1, index[..., None].expand_as(rows), clean)[:, :m]
    return sums / counts.clamp(min=1)[..., None]


def _spread(rows: Tensor, index: Tensor, counts: Tensor, order: Tensor) -> Tensor:
    shares = F.pad(rows / counts.clamp(min=1)[..., None], (0, 0, 0, 1))  # masked tokens have zeros
    return shares.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


CHUNK = 256
"""Rows that are summed at a time."""
_CELLS = "Tensor index, Tensor counts, Tensor order"


@torch.library.custom_op(
    "cbsa_torch::mean_of_cells", mutates_args=(), schema=f"(Tensor rows, {_CELLS}) -> Tensor"
)
def _mean_op(rows: Tensor, index: Tensor, counts: Tensor, order: Tensor) -> Tensor:
    """Sums of sorted rows; nothing is copied, and nothing added by several threads at once."""
    (b, n, c), m = rows.shape, counts.shape[1]
    if b * n == 0:
        return rows.new_zeros(b, m, c)
    # In two steps, by CHUNK rows and by cells: long sums in float32 lose digits, and on CUDA are slow.
    item = n * torch.arange(b, device=rows.device)[:, None]
    cells = (F.pad(counts.cumsum(-1), (1, 0)) + item).flatten()  # where they start: M, and one of masked tokens
    chunks = torch.cat([cells, torch.arange(0, b * n, CHUNK, device=rows.device)]).sort().values
    sums = F.embedding_bag((order + item).flatten(), rows.reshape(b * n, c), chunks, mode="sum")
    numbers = torch.arange(len(chunks), device=rows.device)
    sums = F.embedding_bag(numbers, sums, torch.searchsorted(chunks, cells), mode="sum")
    return sums.view(b, m + 1, c)[:, :m] / counts.clamp(min=1)[..., None]


@torch.library.custom_op(
    "cbsa_torch::spread_from_cells", mutates_args=(), schema=f"(Tensor rows, {_CELLS}) -> Tensor"
)
def _spread_op(rows: Tensor, index: Tensor, counts: Tensor, order: Tensor) -> Tensor:
    b, m, c = rows.shape
    shares = F.pad(rows / counts.clamp(min=1)[..., None], (0, 0, 0, 1)).view(b * (m + 1), c)
    place = index + (m + 1) * torch.arange(b, device=rows.device)[:, None]
    return shares.index_select(0, place.flatten()).view(b, index.shape[1], c)


@_mean_op.register_fake
def _(rows: Tensor, index: Tensor, counts: Tensor, order: Tensor) -> Tensor:
    return rows.new_empty(*counts.shape, rows.shape[2])


@_spread_op.register_fake
def _(rows: Tensor, index: Tensor, counts: Tensor, order: Tensor) -> Tensor:
    return rows.new_empty(*index.shape, rows.shape[2])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


_mean_op.register_autograd(
    lambda ctx, g: (_spread_op(g, *ctx.saved_tensors), *(None,) * 3), setup_context=_save
)
_spread_op.register_autograd(
    lambda ctx, g: (_mean_op(g, *ctx.saved_tensors), *(None,) * 3), setup_context=_save
)


def _find(
    coords: Tensor, token_mask: Tensor | None, sides: Sequence[int], fixed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    b, n, _ = coords.shape
    m = _most(n, sides)
    if b * n == 0:
        index = coords.new_empty(b, n, dtype=torch.int64)
        return index, index.new_zeros(b, m), index.clone()
    layout = locate(coords, token_mask)
    lattices = fixed_lattices(layout, sides) if fixed else search_lattices(layout, sides[0])
    number, order = cell_numbers(layout, lattices).to(coords.device).sort(dim=-1, stable=True)
    rank = F.pad((number[:, 1:] != number[:, :-1]).cumsum(-1), (1, 0))
    index = torch.empty_like(rank).scatter_(-1, order, rank)
    if token_mask is not None:
        index = index.masked_fill(~token_mask, m)
        order = index.argsort(dim=-1, stable=True)
    counts = index.new_zeros(b, m + 1).scatter_add_(-1, index, torch.ones_like(index))[:, :m].contiguous()
    return index, counts, order


def _most(n: int, sides: Sequence[int]) -> int:
    return max(1, min(math.prod(sides), n))


@torch.library.custom_op(
    "cbsa_torch::find_cells",
    mutates_args=(),
    schema="(Tensor coords, Tensor? token_mask, int[] sides, bool fixed) -> (Tensor, Tensor, Tensor)",
)
def _find_op(
    coords: Tensor, token_mask: Tensor | None, sides: Sequence[int], fixed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Opaque to compilers: the search depends on data."""
    return _find(coords, token_mask, sides, fixed)


@_find_op.register_fake
def _(
    coords: Tensor, token_mask: Tensor | None, sides: Sequence[int], fixed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    b, n, _ = coords.shape
    index = coords.new_empty(b, n, dtype=torch.int64)
    return index, coords.new_empty(b, _most(n, sides), dtype=torch.int64), torch.empty_like(index)


def _place(coords: Tensor, token_mask: Tensor | None) -> Tensor:
    if coords.shape[0] * coords.shape[1] == 0:
        return coords.new_empty(coords.shape, dtype=torch.float32)
    places, reach = locate(coords, token_mask)
    longest = reach.amax(-1)
    placed = places / longest.where(longest > 0, 1.0)[:, None, None]
    return placed.float().to(coords.device).mT.contiguous()


@torch.library.custom_op(
    "cbsa_torch::place_in_box", mutates_args=(), schema="(Tensor coords, Tensor? token_mask) -> Tensor"
)
def _place_op(coords: Tensor, token_mask: Tensor | None) -> Tensor:
    """Opaque to compilers: whether coordinates are finite depends on data."""
    return _place(coords, token_mask)


@_place_op.register_fake
def _(coords: Tensor, token_mask: Tensor | None) -> Tensor:
    return coords.new_empty(coords.shape, dtype=torch.float32)


class Coordinates:
    """Coordinates of the tokens after the prefix, and the cells found for them.

    Make one for each forward pass of a model and hand it to all layers, which then search once. Nothing of it
    outlives the pass.

    Args:
        coords: ``(B, N, k)`` as for :func:`find_cells`.
        token_mask: ``(B, N)`` bool, True = a real token. Only for tokens that are spread over processes, each
            of which knows the mask of its own alone: cells are those of the tokens of all.

    Examples:
        >>> from cbsa_torch import CBSA
        >>> from cbsa_torch.nn import Coordinates
        >>> places = Coordinates(torch.rand(1, 500, 2))
        >>> layers = [CBSA(64, 4) for _ in range(2)]  # search for cells once
        >>> [layer(torch.randn(1, 500, 64), coords=places).shape for layer in layers]
        [torch.Size([1, 500, 64]), torch.Size([1, 500, 64])]
    """

    def __init__(self, coords: Tensor, token_mask: Tensor | None = None) -> None:
        check_coords(coords)
        if token_mask is not None:
            check_mask("token_mask", token_mask, coords.shape[:2], "(B, N)", "a real token", ("coords", coords))
        self.coords = coords
        self.token_mask = token_mask
        self._found: dict[int | GridSize, tuple[Tensor | None, Cells]] = {}

    def cells(self, num_representatives: int | Sequence[int], token_mask: Tensor | None = None) -> Cells:
        """:func:`find_cells`, once for each number as long as the mask is the same object.

        Args:
            num_representatives: as there.
            token_mask: ``(B, prefix + N)`` bool, of the tokens with those before them that have no coordinates.
                Default: that of the coordinates.
        """
        number = check_num_representatives(num_representatives)
        if number in self._found and self._found[number][0] is token_mask:
            return self._found[number][1]
        own = (
            self.token_mask
            if token_mask is None
            else token_mask[:, token_mask.shape[1] - self.coords.shape[1] :]
        )
        cells = find_cells(self.coords, number, token_mask=own)
        self._found[number] = token_mask, cells
        return cells
