"""Tokens and feature maps: one reading of an input, shared by every token mixer.

A mixer accepts ``(B, N, C)`` tokens, prefix tokens first, or a ``(B, C, *grid)`` feature map, and returns
the layout it was given.
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple

import torch
from torch import Tensor

from cbsa_torch._core.autodiff import check_values, has_values
from cbsa_torch._core.checks import check_device, check_floating, check_mask
from cbsa_torch._core.tracing import is_open
from cbsa_torch._core.types import GridSize
from cbsa_torch.ops.coordinates import Coordinates
from cbsa_torch.ops.parallel import ContextParallel
from cbsa_torch.ops.pooling import check_grid

HIDDEN = -1e4
"""Numbers that additive masks hide keys with: this or less. timm takes the lowest of the dtype."""


class MixerInput(NamedTuple):
    """What a mixer reads from the arguments of ``forward``: all that it does starts from this record.

    Examples:
        >>> from cbsa_torch import CBSA
        >>> source = CBSA(64, 4).heads(torch.randn(2, 64, 8, 6)).source
        >>> source.x.shape, source.map_grid, source.num_prefix_tokens
        (torch.Size([2, 48, 64]), (8, 6), 0)
    """

    x: Tensor
    """``(B, N, C)`` the tokens, prefix tokens first; zeros where ``token_mask`` is False."""
    map_grid: GridSize | None
    """The grid of the feature map that the input was; None if it was tokens."""
    grid_size: GridSize | None
    """The grid of the tokens after the prefix; None if they have coordinates, or no grid is needed or given."""
    num_prefix_tokens: int
    """Tokens before those on the grid or with coordinates."""
    token_mask: Tensor | None = None
    """``(B, N)`` bool, True = a real token; None if all are."""
    attn_mask: Tensor | None = None
    """A mask that differs from query to query, for mixers that compare tokens with tokens."""
    is_causal: bool = False
    """Whether ``attn_mask`` is the triangle that lets no token attend to later ones."""
    rope: Tensor | None = None
    """Rotary position embeddings of the grid tokens, as timm makes them."""
    coords: Coordinates | None = None
    """Where the tokens after the prefix are, in place of a grid."""
    parallel: ContextParallel | None = None
    """Who has the other tokens, if ``x`` and ``token_mask`` are of one rank; the rest is of all ranks."""

    def restore(self, tokens: Tensor) -> Tensor:
        """Give ``(B, N, C)`` tokens the layout of the input again."""
        if self.map_grid is None:
            return tokens
        return tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *self.map_grid)


class Heads(NamedTuple):
    """What the projections make of an input: the tokens in the subspaces of the heads.

    Examples:
        >>> from cbsa_torch import CBSA
        >>> heads = CBSA(64, 4).heads(torch.randn(2, 64, 8, 6))
        >>> heads.queries.shape, heads.keys is heads.queries
        (torch.Size([2, 4, 48, 16]), True)
    """

    source: MixerInput
    """What was projected."""
    queries: Tensor
    """``(B, H, N, P)``; if one projection is shared, U_k^T Z, and keys and values are the same object."""
    keys: Tensor
    """``(B, H, N, P)``."""
    values: Tensor
    """``(B, H, N, P)``."""
    basis: Tensor | None = None
    """``(H * P, C)`` the matrix of the input projection, where its transpose projects out again (``tied``)."""


def as_tokens(x: Tensor, dim: int, channels_first: bool | None) -> tuple[Tensor, GridSize | None]:
    """Read ``x`` as ``(B, N, C)`` tokens of ``dim`` channels; with the grid if it is a feature map.

    ``channels_first=None`` decides by shape: with 4 or 5 axes ``x`` is a feature map; with 3 it is tokens
    if its last axis has ``dim`` channels, else a 1-D feature map.
    """
    check_floating("x", x)
    if not 3 <= x.ndim <= 5:
        raise ValueError(
            f"x must be (B, N, C) tokens or a (B, C, *grid) feature map with a 1-, 2- or 3-D grid, "
            f"got shape {tuple(x.shape)}"
        )
    if channels_first is None:
        channels_first = x.ndim > 3 or (x.shape[2] != dim and x.shape[1] == dim)
    elif not channels_first and x.ndim != 3:
        raise ValueError(f"x must be (B, N, C) tokens with channels_first=False, got shape {tuple(x.shape)}")
    channels = x.shape[1] if channels_first else x.shape[2]
    if channels != dim:
        axis = 1 if channels_first else 2
        raise ValueError(f"x must have dim={dim} channels on axis {axis}, got {channels} in {tuple(x.shape)}")
    return (x.flatten(2).transpose(1, 2), tuple(x.shape[2:])) if channels_first else (x, None)


def flat_mask(token_mask: Tensor, x: Tensor, map_grid: GridSize | None) -> Tensor:
    """Check a mask of the tokens ``x``, ``(B, N)`` or ``(B, *grid)`` for a feature map; ``(B, N)``."""
    if map_grid is None:
        check_mask("token_mask", token_mask, x.shape[:2], "(B, N)", "a real token", ("x", x))
        return token_mask
    check_mask("token_mask", token_mask, (x.shape[0], *map_grid), "(B, *grid)", "a real token", ("x", x))
    return token_mask.flatten(1)


def check_num_prefix_tokens(number: int) -> None:
    """Raise unless it is a number of tokens."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"num_prefix_tokens must be an int of at least 0, got {number!r}")


def resolve_grid(
    num_tokens: int, grid_size: GridSize | None, num_prefix_tokens: int | None
) -> tuple[GridSize, int]:
    """Find the grid of ``num_tokens`` tokens and how many prefix tokens stand before it.

    Without ``grid_size`` the grid must be a square; without ``num_prefix_tokens`` they are what the grid
    leaves, or, with neither, 0 or 1 (a class token), whichever leaves a square.
    """
    if grid_size is not None:
        grid_size = check_grid(grid_size)
        prefix = num_tokens - math.prod(grid_size)
        if is_open(prefix):
            raise ValueError(
                f"grid_size {grid_size} is that of the example, and an export leaves the number of tokens open "
                "(dynamic): give the layer a feature map, or tokens with a grid_size made of the sizes of its "
                "input; or keep the number of tokens fixed"
            )
        prefix = int(prefix)  # a tensor under torch.jit.trace, where the sizes are pinned already
        # not "not in (None, prefix)": PyTorch 2.8 traces that wrongly once two threads have compiled at once
        if prefix < 0 or (num_prefix_tokens is not None and num_prefix_tokens != prefix):
            expected = "" if num_prefix_tokens is None else f" + {num_prefix_tokens} prefix tokens"
            raise ValueError(
                f"grid_size {grid_size} has {math.prod(grid_size)} cells{expected}, "
                f"but x has {num_tokens} tokens"
            )
        return grid_size, prefix
    if is_open(num_tokens):
        raise ValueError(
            "grid_size is needed where an export leaves the number of tokens open (dynamic): the grid would be "
            "that of the example at any size. Give the layer a feature map, or tokens with a grid_size made of "
            "the sizes of its input; or keep the number of tokens fixed"
        )
    for prefix in (0, 1) if num_prefix_tokens is None else (num_prefix_tokens,):
        cells = operator.index(num_tokens - prefix)  # a plain integer, under a compiler too
        side = math.isqrt(max(cells, 0))
        if side > 0 and side * side == cells:
            return (side, side), prefix
    less = "0 or 1" if num_prefix_tokens is None else str(num_prefix_tokens)
    raise ValueError(
        f"x has {num_tokens} tokens, which less {less} prefix tokens is not a square grid; pass grid_size "
        "(to forward, to set_input_size or to the constructor) or num_prefix_tokens"
    )


def read_coords(
    coords: Tensor | Coordinates, tokens: Tensor, num_prefix_tokens: int | None, n: int | None = None
) -> tuple[Coordinates, int]:
    """Check the coordinates of ``(B, N, C)`` tokens, or of ``n`` on all ranks; and how many the prefix has."""
    coords = coords if isinstance(coords, Coordinates) else Coordinates(coords)
    check_device("coords", coords.coords, "x", tokens)
    b, n, shape = tokens.shape[0], tokens.shape[1] if n is None else n, coords.coords.shape
    prefix = n - shape[1]
    if shape[0] != b or prefix < 0 or (num_prefix_tokens is not None and num_prefix_tokens != prefix):
        less = "at most N" if num_prefix_tokens is None else f"N less {num_prefix_tokens} prefix tokens"
        raise ValueError(
            f"coords must have shape (B, N, k) with B={b} and coordinates for {less} tokens, where x has "
            f"N={n}; got {tuple(shape)}"
        )
    return coords, prefix


def read_attn_mask(
    attn_mask: Tensor, token_mask: Tensor | None, b: int, n: int, *, compares_tokens: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Token mask and attention mask of a mixer from timm's ``attn_mask``, which may be the first of them."""
    if compares_tokens and not is_token_mask(attn_mask, b, n):
        return token_mask, attn_mask
    if token_mask is not None:
        raise ValueError("pass token_mask or attn_mask, not both")
    return as_token_mask(attn_mask, b, n), None


def is_token_mask(attn_mask: Tensor, b: int, n: int) -> bool:
    """Whether timm's ``attn_mask`` is a token mask: the same for every query, and it keeps or hides each key.

    That is a boolean mask, or one to be added to the logits of 0 and numbers of at most -10,000. While tracing
    numbers cannot be looked at, and the answer is no.
    """
    if not _is_of_keys(attn_mask, b, n):
        return False
    if attn_mask.dtype == torch.bool:
        return True
    return has_values(attn_mask.detach()) and bool(_keeps_or_hides(attn_mask))


def _is_of_keys(attn_mask: Tensor, b: int, n: int) -> bool:
    shaped = isinstance(attn_mask, Tensor) and tuple(attn_mask.shape) in ((b, 1, n), (b, 1, 1, n), (1, 1, 1, n))
    return shaped and (attn_mask.dtype == torch.bool or attn_mask.is_floating_point())


def _keeps_or_hides(attn_mask: Tensor) -> Tensor:
    return ((attn_mask == 0) | (attn_mask <= HIDDEN)).all()


def as_token_mask(attn_mask: Tensor, b: int, n: int) -> Tensor:
    """Read timm's ``attn_mask`` as a token mask where it is one, see :func:`is_token_mask`.

    Linear attention has no N x N matrix to mask entry by entry. A 2-D mask is refused: timm reads it as
    (queries, keys).
    """
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, got {type(attn_mask).__name__}")
    if not _is_of_keys(attn_mask, b, n):
        raise ValueError(
            "attn_mask must be a key-padding mask of shape (B, 1, N) or (B, 1, 1, N), boolean or additive: "
            f"this attention forms no N x N matrix; got {attn_mask.dtype} of shape {tuple(attn_mask.shape)}"
        )
    keys = attn_mask.detach().reshape(-1, n)
    if keys.dtype != torch.bool:
        check_values(
            _keeps_or_hides(keys),
            "attn_mask must keep keys (0) or hide them (-10,000 or less): here are no weights; got others",
        )
        keys = keys == 0
    return keys.expand(b, n)
