"""What a token mixer makes of the arguments it is called with: tokens, their masks, and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Tracer

from cbsa_torch._core.tracing import pin_sides, pin_size
from cbsa_torch._core.types import GridSize, Layout, Strategy
from cbsa_torch.nn.grids import GridFollower
from cbsa_torch.nn.packing import Group, Packing
from cbsa_torch.nn.tokens import (
    MixerInput,
    as_tokens,
    check_num_prefix_tokens,
    flat_mask,
    read_attn_mask,
    read_coords,
    resolve_grid,
)
from cbsa_torch.ops.coordinates import Coordinates
from cbsa_torch.ops.parallel import ContextParallel
from cbsa_torch.ops.pooling import check_grid


class TokenReader(nn.Module):
    """Reads the input of a token mixer, see :class:`cbsa_torch.nn.TokenMixer` for what it is."""

    compares_tokens = False
    """Whether every token is compared with every other: masks may then differ from query to query."""

    rotates = False
    """Whether it takes rotary position embeddings."""

    shards = False
    """Whether it can work on tokens that are spread over processes."""

    dim: int
    channels_first: bool | None
    assumes_square: bool

    def __init__(self) -> None:
        super().__init__()
        self.grid_size: GridSize | None = None
        self.num_prefix_tokens: int | None = None
        self.grid_follower: GridFollower | None = None
        self.representatives: Strategy | None = None
        self.layout: Layout = "standard"

    def set_input_size(self, grid_size: GridSize | None, num_prefix_tokens: int | None = None) -> None:
        """Set the grid of token inputs (None: forget it) and, if given, the prefix tokens."""
        self.grid_size = None if grid_size is None else check_grid(grid_size)
        if num_prefix_tokens is not None:
            check_num_prefix_tokens(num_prefix_tokens)
            self.num_prefix_tokens = num_prefix_tokens

    @property
    def needs_grid(self) -> bool:
        """Whether the mixer uses the tokens' grid: whether representatives are made from it."""
        return getattr(self.representatives, "needs_grid", False)

    def read(
        self,
        x: Tensor,
        grid_size: GridSize | None = None,
        token_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        coords: Tensor | Coordinates | None = None,
        cu_seqlens: Tensor | Packing | None = None,
        grid_sizes: Sequence[GridSize] | None = None,
        parallel: ContextParallel | None = None,
    ) -> MixerInput:
        """Read the arguments of :meth:`forward`; it raises what that raises, and for packed sequences."""
        name = type(self).__name__
        if cu_seqlens is not None or grid_sizes is not None or (isinstance(x, Tensor) and x.is_nested):
            raise ValueError("x must be a batch here, not packed sequences: take these one by one")
        if is_causal and not self.compares_tokens:
            raise ValueError(f"is_causal must be False: {name} summarises all tokens before it updates any")
        if rope is not None and not self.rotates:
            raise ValueError(f"rope must be None: {name} has no rotary position embeddings")
        if attn_mask is not None and is_causal:
            raise ValueError("pass attn_mask or is_causal, not both")
        if parallel is not None:
            self.check_shards()
        if self.needs_grid and coords is None and parallel is None and isinstance(x, Tensor):
            x = pin_size(x, tuple(range(1, x.ndim)))
        tokens, map_grid = as_tokens(x, self.dim, self.channels_first)
        b, n, _ = tokens.shape
        if parallel is not None:
            if map_grid is not None:
                raise ValueError("x must be (B, N, C) tokens with parallel, not a feature map")
            parallel.check("x", n)
        if token_mask is not None:
            token_mask = flat_mask(token_mask, tokens, map_grid)
        if is_causal:
            attn_mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        elif attn_mask is not None:
            token_mask, attn_mask = read_attn_mask(
                attn_mask, token_mask, b, n, compares_tokens=self.compares_tokens
            )
        places = None
        if coords is None and map_grid is None and grid_size is None and parallel is None:
            followed = self._followed(tokens)
            if isinstance(followed, Coordinates):
                coords = followed
            else:
                grid_size = followed
        if self.needs_grid:
            tokens = pin_sides(tokens, grid_size)
        if coords is not None:
            if map_grid is not None or grid_size is not None:
                raise ValueError("pass coords or a grid (grid_size, a feature map), not both")
            self._check_coords(coords)
            length = None if parallel is None else parallel.num_tokens
            grid, (places, prefix) = None, read_coords(coords, tokens, self.num_prefix_tokens, length)
            self._check_place_mask(places, token_mask, parallel)
        elif parallel is None:
            grid, prefix = self._locate(tokens, map_grid, grid_size)
        else:
            grid, prefix = self._locate_slice(grid_size, parallel)
        if token_mask is not None:
            # Padding may hold NaN, which the gradient of the projection's weight would carry on.
            tokens = tokens.masked_fill(~token_mask[..., None], 0.0)
        return MixerInput(
            tokens, map_grid, grid, prefix, token_mask, attn_mask, is_causal, rope, places, parallel
        )

    def _check_place_mask(
        self, places: Coordinates, token_mask: Tensor | None, parallel: ContextParallel | None
    ) -> None:
        """Raise unless coordinates know the mask of all tokens where ranks have masks of their own."""
        if parallel is None:
            if places.token_mask is not None:
                raise ValueError(
                    "coords must have no token_mask of their own without parallel: pass it to the layer"
                )
        elif (places.token_mask is None) != (token_mask is None) and self.needs_grid:
            raise ValueError(
                "token_mask, of this rank's tokens, and that of coords, of the tokens of all ranks, must be "
                "given together: give coords as Coordinates(coords, token_mask), by which cells are found"
            )
        elif places.token_mask is not None and token_mask is not None and not torch.compiler.is_compiling():
            first = places.coords.shape[1] - parallel.num_tokens + parallel.start  # negative: prefix tokens
            own = token_mask[:, max(0, -first) :]
            if not torch.equal(own, places.token_mask[:, max(0, first) :][:, : own.shape[1]]):
                raise ValueError(
                    "token_mask must be the part of this rank of the mask in coords, "
                    "Coordinates(coords, token_mask), which is of the tokens of all ranks; they differ"
                )

    def check_shards(self) -> None:
        """Raise where what the mixer computes is no sum over tokens that ranks could exchange."""
        name = type(self).__name__
        if not self.shards:
            instead = "CBSA, LinearCBSA, TSSA or AgentAttention"
            why = "compares every token with every other" if self.compares_tokens else "is not written for it"
            raise ValueError(f"parallel must be None: {name} {why}; use {instead}")
        if self.representatives is not None and not getattr(self.representatives, "takes_parallel", False):
            kind = type(self.representatives).__name__
            raise ValueError(
                f"parallel must be None: representatives of {name} ({kind}) need all tokens; use 'pool' or "
                "'learned' (for 'principal' LinearCBSA, for 'basis' TSSA(form='channel')), or give them "
                "takes_parallel = True if they take parallel and num_prefix_tokens"
            )

    def _locate_slice(
        self, grid_size: GridSize | None, parallel: ContextParallel
    ) -> tuple[GridSize | None, int]:
        """The grid of the tokens of all ranks, and the number of prefix tokens before it."""
        if grid_size is None:
            grid_size = parallel.grid_size
        elif parallel.grid_size not in (None, check_grid(grid_size)):
            raise ValueError(f"grid_size {grid_size} differs from that of parallel, {parallel.grid_size}")
        grid_size = self.grid_size if grid_size is None else grid_size
        if grid_size is None and not self.needs_grid:
            return None, self.num_prefix_tokens or 0
        if grid_size is None:
            raise ValueError(
                f"grid_size (or coords) is needed with parallel: {type(self).__name__} pools a grid"
            )
        return resolve_grid(parallel.num_tokens, grid_size, self.num_prefix_tokens)

    def _check_coords(self, coords: Tensor | Coordinates | None) -> None:
        """Raise where representatives need a grid, and coordinates would not do."""
        if coords is None or not self.needs_grid:
            return
        if self.layout == "official":
            raise ValueError("coords need layout='standard': 'official' is a way of pooling over grids")
        if not getattr(self.representatives, "takes_cells", False):
            raise ValueError(
                f"coords must be None: representatives ({type(self.representatives).__name__}) need a grid; "
                "give them takes_cells = True and num_representatives if they can be made of ops.Cells"
            )

    def _followed(self, tokens: Tensor) -> GridSize | Coordinates | None:
        """Where the model has the tokens, for a layer that needs to know and has no grid of its own."""
        if not self.needs_grid or self.grid_size is not None or self.grid_follower is None:
            return None
        return self.grid_follower.place_of(tokens)

    def fx_arguments(self, tracer: Tracer) -> dict[str, Any]:
        """What an FX graph hands to the layer besides its tokens: where the model's embedding puts them."""
        if not self.needs_grid or self.grid_size is not None or self.grid_follower is None:
            return {}
        return {"grid_size": self.grid_follower.grid_in_fx(tracer)}

    def _locate(
        self,
        tokens: Tensor,
        map_grid: GridSize | None,
        grid_size: GridSize | None,
        num_prefix_tokens: int | None = None,
    ) -> tuple[GridSize | None, int]:
        """The grid of the tokens, None if there is none, and the number of prefix tokens before it."""
        prefix = self.num_prefix_tokens if num_prefix_tokens is None else num_prefix_tokens
        if map_grid is not None:
            if grid_size is not None and check_grid(grid_size) != map_grid:
                raise ValueError(f"grid_size {grid_size} differs from the feature map's {map_grid}")
            return map_grid, 0
        grid_size = self.grid_size if grid_size is None else grid_size
        if grid_size is None and not self.needs_grid:
            return None, prefix or 0
        if grid_size is None and not self.assumes_square:
            raise ValueError(
                f"grid_size is needed: {type(self).__name__} got {tokens.shape[1]} tokens, and assumes no "
                "square, for it replaced a layer of a model, or was built while the grid hook was removed. "
                "Call cbsa_torch.nn.follow_grid(model) once, or give coords or grid_size (set_input_size)"
            )
        return resolve_grid(tokens.shape[1], grid_size, prefix)

    def source_of(self, group: Group, x: Tensor, is_causal: bool) -> MixerInput:
        """What :meth:`read` would read of a batch of sequences that are alike."""
        self._check_coords(group.coords)
        prefix = group.num_prefix_tokens
        if None not in (prefix, self.num_prefix_tokens) and prefix != self.num_prefix_tokens:
            raise ValueError(
                f"num_prefix_tokens of the packed sequences must be the layer's {self.num_prefix_tokens}, "
                f"got {prefix}"
            )
        if group.coords is not None:
            grid, prefix = None, read_coords(group.coords, x, prefix)[1]
        else:
            grid, prefix = self._locate(x, None, group.grid_size, prefix)
        n = group.length
        attn_mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril() if is_causal else None
        return MixerInput(x, None, grid, prefix, None, attn_mask, is_causal, None, group.coords)

    def token_grid(self, *args: Any, **kwargs: Any) -> tuple[GridSize, int] | None:
        """The grid that :meth:`forward`, called like this, uses, and the number of prefix tokens before it.

        None if the mixer needs no grid and none is given.
        """
        source = self.read(*args, **kwargs)
        return None if source.grid_size is None else (source.grid_size, source.num_prefix_tokens)
