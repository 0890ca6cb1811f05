"""What every token mixer shares: reading the input, projecting into subspaces and out of them.

A mixer is this and one function of :mod:`cbsa_torch.ops` between the projections.
"""

from __future__ import annotations

import abc
import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from cbsa_torch._core.autodiff import is_transformed
from cbsa_torch._core.checks import check_bool, check_choice, check_positive_int
from cbsa_torch._core.types import QKV, QKVS, GridSize, Representatives
from cbsa_torch.nn.grids import GridFollower, install_grid_hook
from cbsa_torch.nn.orthonormal import check_factorable, keep_rows_orthonormal
from cbsa_torch.nn.tokens import TokenInput, as_token_mask, is_token_mask, read_tokens, resolve_grid
from cbsa_torch.ops.counting import Counts
from cbsa_torch.ops.representatives import check_grid


class MixerOptions(TypedDict, total=False):
    """Keyword arguments that every mixer takes; see :class:`TokenMixer`."""

    head_dim: int | None
    tied: bool
    orthogonal: bool
    num_prefix_tokens: int | None
    grid_size: GridSize | None
    channels_first: bool | None
    attn_head_dim: int | None
    dim_out: int | None
    qkv_bias: bool
    qk_norm: bool
    scale_norm: bool
    proj_bias: bool
    gated: bool
    attn_drop: float
    proj_drop: float
    norm_layer: type[nn.Module] | None
    recompute: bool
    device: torch.device | str | None
    dtype: torch.dtype | None


class Heads(NamedTuple):
    """An input projected into the subspaces."""

    tokens: Tensor
    """``(B, H, N, P)`` U_k^T Z, or the queries if projections are separate."""
    keys: Tensor | None
    values: Tensor | None
    """``(B, H, N, P)``; None if one projection is query, key and value."""
    token_mask: Tensor | None
    """``(B, N)`` bool, True = a real token."""
    map_grid: GridSize | None
    """The grid of the feature map the input was, or None if it was tokens."""
    grid_size: GridSize | None
    """The grid that was passed to ``forward``."""
    attn_mask: Tensor | None = None
    """A mask that differs from query to query, for mixers that have :attr:`TokenMixer.compares_tokens`."""


class TokenMixer(nn.Module, abc.ABC):
    """Base of CBSA, MSSA, TSSA, LinearCBSA, AgentAttention and MHSA: projections around an operator.

    Args:
        dim: channels of input and output.
        num_heads: number of subspaces H.
        head_dim: dimension P of each subspace. Default: ``dim / num_heads``.
        tied: project out with the transpose of the input projection (the rigorous form; no bias in the
            output) instead of an independent linear layer.
        orthogonal: keep the rows of the input projection orthonormal: orthonormal bases U_k of disjoint
            subspaces, U_i^T U_j = 0 (Householder reflections; float32 or float64 parameters). Needs one
            shared projection and ``num_heads * head_dim <= dim``.
        qkv: ``"shared"``: one projection is query, key and value, the subspace bases U_k of the paper;
            ``"separate"``: three, as in a ViT.
        num_prefix_tokens: class and register tokens before the grid tokens; they are attended to but not
            pooled. Default: what ``grid_size`` leaves, else 0 or 1, whichever leaves a square grid. Give it
            (or the grid) if your grids are not square: 1 + 2 x 4 tokens also look like 3 x 3.
        grid_size: the tokens' grid, if inputs are tokens of one known size; see :meth:`set_input_size`.
        channels_first: how to read a 3-D input: True = ``(B, C, L)``, False = ``(B, N, C)``, None = tokens
            if its last axis is ``dim``, else a 1-D feature map.
        attn_head_dim: timm's name for ``head_dim``.
        dim_out: output channels. Default: ``dim``.
        qkv_bias, proj_bias: biases of the projections.
        qk_norm: normalise queries and keys per head with ``norm_layer``; needs separate projections.
        scale_norm: normalise the heads' joint output with ``norm_layer`` before projecting out.
        gated: not supported; raises.
        attn_drop: dropout rate of attention weights; only for mixers that compare tokens with tokens.
        proj_drop: dropout rate after the output projection.
        norm_layer: constructor of normalisation layers, for ``qk_norm`` and ``scale_norm``.
        recompute: keep only the input for the backward pass, N * dim numbers, and compute the rest again there:
            a training step takes about a third longer. Without effect under ``torch.func``.
        device, dtype: of the parameters.

    Attributes:
        qkv: the input projection. proj: the output projection (None if tied).

    Shape:
        ``(B, N, C)`` tokens, prefix tokens first, or ``(B, C, *grid)`` with a 1-, 2- or 3-D grid; the
        output has the layout of the input.
    """

    compares_tokens = False
    """Whether every token is compared with every other: masks may then differ from query to query."""

    rotates = False
    """Whether it takes rotary position embeddings."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        tied: bool = False,
        orthogonal: bool = False,
        qkv: QKV = "shared",
        num_prefix_tokens: int | None = None,
        grid_size: GridSize | None = None,
        channels_first: bool | None = None,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        install_grid_hook(after_removal=False)
        check_bool("recompute", recompute)
        self.recompute = recompute
        check_positive_int("dim", dim)
        check_positive_int("num_heads", num_heads)
        check_choice("qkv", qkv, QKVS)
        check_bool("tied", tied)
        check_bool("orthogonal", orthogonal)
        if head_dim is not None and attn_head_dim is not None and head_dim != attn_head_dim:
            raise ValueError(f"head_dim ({head_dim}) and attn_head_dim ({attn_head_dim}) must agree")
        head_dim = attn_head_dim if head_dim is None else head_dim
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(
                    f"dim (={dim}) must be divisible by num_heads (={num_heads}), or pass head_dim"
                )
            head_dim = dim // num_heads
        check_positive_int("head_dim", head_dim)
        dim_out = dim if dim_out is None else dim_out
        check_positive_int("dim_out", dim_out)
        name = type(self).__name__
        if gated:
            raise ValueError(f"gated must be False: {name} has no output gate")
        if attn_drop and not self.compares_tokens:
            raise ValueError(
                f"attn_drop must be 0 for {name}, which has no N x N weights to drop; got {attn_drop}"
            )
        if qk_norm and qkv == "shared":
            raise ValueError("qk_norm needs qkv='separate': shared queries, keys and values are one tensor")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("norm_layer is required with qk_norm or scale_norm")
        if tied and (qkv == "separate" or dim_out != dim):
            raise ValueError("tied needs qkv='shared' and dim_out equal to dim: it reuses the input projection")
        inner = num_heads * head_dim
        if orthogonal and (qkv == "separate" or inner > dim):
            raise ValueError(
                f"orthogonal needs qkv='shared' and num_heads * head_dim (={inner}) at most dim (={dim}): "
                "there are no more orthogonal directions"
            )

        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.tied = tied
        self.orthogonal = orthogonal
        self.shared_qkv = qkv == "shared"
        self.attn_drop = attn_drop
        self.grid_size: GridSize | None = None
        self.grid_source: GridFollower | None = None
        self.num_prefix_tokens: int | None = None
        self.set_input_size(grid_size, num_prefix_tokens)
        self.channels_first = channels_first

        self.qkv = nn.Linear(dim, inner * (1 if self.shared_qkv else 3), qkv_bias, device, dtype)
        if orthogonal:
            check_factorable(self.qkv.weight)
            keep_rows_orthonormal(self.qkv)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        if norm_layer is not None and qk_norm:
            self.q_norm = norm_layer(head_dim, device=device, dtype=dtype)
            self.k_norm = norm_layer(head_dim, device=device, dtype=dtype)
        if norm_layer is not None and scale_norm:
            self.norm = norm_layer(inner, device=device, dtype=dtype)
        self.proj = None if tied else nn.Linear(inner, dim_out, proj_bias, device, dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    @abc.abstractmethod
    def mix(self, heads: Heads) -> Tensor:
        """The operator: ``(B, H, N, P)`` tokens to their update. Masked tokens are zeroed by the caller."""

    @abc.abstractmethod
    def count_heads(self, heads: Heads) -> Counts:
        """What :meth:`mix` costs per item, without the projections."""

    def mix_and_project(self, heads: Heads) -> Tensor:
        """:meth:`mix`, and out of the subspaces: ``(B, N, C)``. A mixer may do both at once."""
        joined = self.norm(self.mix(heads).transpose(1, 2).flatten(2))  # (B, N, H * P)
        return F.linear(joined, self.qkv.weight.t()) if self.proj is None else self.proj(joined)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        if self.orthogonal:  # the layer's own reset wrote into a copy
            self.qkv.weight = nn.init.orthogonal_(torch.empty_like(self.qkv.weight))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay."""
        return {"qkv.parametrizations.weight.original"} if self.orthogonal else set()

    def set_input_size(self, grid_size: GridSize | None, num_prefix_tokens: int | None = None) -> None:
        """Set the grid of token inputs (None: assume a square again) and, if given, the prefix tokens."""
        self.grid_size = None if grid_size is None else check_grid(grid_size)
        if num_prefix_tokens is not None:
            whole = isinstance(num_prefix_tokens, int) and not isinstance(num_prefix_tokens, bool)
            if not whole or num_prefix_tokens < 0:
                raise ValueError(f"num_prefix_tokens must be an int of at least 0, got {num_prefix_tokens!r}")
            self.num_prefix_tokens = num_prefix_tokens

    def forward(
        self,
        x: Tensor,
        grid_size: GridSize | None = None,
        token_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens.

        Args:
            x: ``(B, N, C)`` tokens, prefix tokens first, or a ``(B, C, *grid)`` feature map.
            grid_size: the grid of token inputs. Default: the layer's; without it, a square.
            token_mask: ``(B, N)``, or ``(B, *grid)`` for a feature map; bool, True = a real token. The
                others are ignored and get zeros.
            attn_mask: timm's argument; a boolean mask that is the same for every query is read as
                ``token_mask``. Any other, ``(N, N)`` or ``(B, 1 or H, N, N)``, only for mixers that compare
                tokens with tokens (MSSA, MHSA): the others form no N x N matrix.
            is_causal: let no token attend to later ones; for the same mixers.
            rope: timm's rotary position embeddings; only for layers adapted from such a model.

        Returns:
            The update, in the layout of ``x``: use it as ``x + mixer(norm(x))``.

        Raises:
            ValueError: channels, a grid or a mask that do not fit; no grid where one is needed; a mask
                that the mixer has no use for. TypeError: wrong dtypes.
        """
        if is_causal and not self.compares_tokens:
            raise ValueError(
                f"is_causal must be False: {type(self).__name__} summarises all tokens before it updates any"
            )
        source, token_mask, attn_mask = self._read(x, token_mask, attn_mask, is_causal, rope)
        grid_size = self._grid_of(source, grid_size)
        arguments = source, grid_size, token_mask, attn_mask
        if self.recompute and torch.is_grad_enabled() and not is_transformed():
            out = checkpoint(self._update, *arguments, use_reentrant=False)
        else:
            out = self._update(*arguments)
        out = self.proj_drop(out)
        if token_mask is not None:
            out = out.masked_fill(~token_mask[..., None], 0.0)  # the biases, too
        return source.restore(out)

    def _update(
        self,
        source: TokenInput,
        grid_size: GridSize | None,
        token_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Into the subspaces, mix, and out again: ``(B, N, C)``."""
        # A tied orthogonal basis is used twice, and made once.
        with parametrize.cached() if self.tied and self.orthogonal else nullcontext():
            return self.mix_and_project(self._project(source, grid_size, token_mask, attn_mask))

    @classmethod
    def named_arguments(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of :meth:`forward` by name, for hooks that see how it was called."""
        bound = inspect.signature(cls.forward).bind(None, *args, **kwargs)
        bound.apply_defaults()
        return {name: value for name, value in bound.arguments.items() if name != "self"}

    def counts(
        self,
        x: Tensor,
        grid_size: GridSize | None = None,
        token_mask: Tensor | None = None,
        rope: Tensor | None = None,
    ) -> Counts:
        """What :meth:`forward` costs per item of ``x`` between the projections (those are linear layers)."""
        source, token_mask, _ = self._read(x, token_mask, None, rope=rope)
        counts = self.count_heads(self._project(source, self._grid_of(source, grid_size), token_mask))
        if self.proj is not None:
            return counts
        inner = self.num_heads * self.head_dim
        return counts.plus(Counts(products=2 * source.tokens.shape[1] * inner * self.dim))

    def heads(
        self,
        x: Tensor,
        grid_size: GridSize | None = None,
        token_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rope: Tensor | None = None,
    ) -> Heads:
        """The tokens in their subspaces, as :meth:`forward` makes them from these arguments."""
        source, token_mask, attn_mask = self._read(x, token_mask, attn_mask, rope=rope)
        return self._project(source, self._grid_of(source, grid_size), token_mask, attn_mask)

    def token_grid(self, x: Tensor, grid_size: GridSize | None = None) -> tuple[GridSize, int] | None:
        """The grid that :meth:`forward` uses for ``x`` and the number of prefix tokens before it.

        None if the mixer needs no grid and none is given.
        """
        source = read_tokens(x, self.dim, self.channels_first, None)
        return self._locate(source.tokens.shape[1], source.map_grid, self._grid_of(source, grid_size))

    @property
    def needs_grid(self) -> bool:
        """Whether the mixer uses the tokens' grid."""
        return False

    def _read(
        self,
        x: Tensor,
        token_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool = False,
        rope: Tensor | None = None,
    ) -> tuple[TokenInput, Tensor | None, Tensor | None]:
        """The input as tokens, its token mask, and what else there is of a mask."""
        if rope is not None and not self.rotates:
            raise ValueError(f"rope must be None: {type(self).__name__} has no rotary position embeddings")
        source = read_tokens(x, self.dim, self.channels_first, token_mask)._replace(rope=rope)
        b, n, _ = source.tokens.shape
        if is_causal:
            if attn_mask is not None:
                raise ValueError("pass attn_mask or is_causal, not both")
            return source, source.token_mask, torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        if attn_mask is None:
            return source, source.token_mask, None
        if self.compares_tokens and not is_token_mask(attn_mask, b, n):
            return source, source.token_mask, attn_mask
        if token_mask is not None:
            raise ValueError("pass token_mask or attn_mask, not both")
        return source, as_token_mask(attn_mask, b, n), None

    def _project(
        self,
        source: TokenInput,
        grid_size: GridSize | None,
        token_mask: Tensor | None,
        attn_mask: Tensor | None = None,
    ) -> Heads:
        """Into the subspaces."""
        x = source.tokens
        b, n, _ = x.shape
        if token_mask is not None:
            # Padding may hold NaN, which the gradient of the projection's weight would carry on.
            x = x.masked_fill(~token_mask[..., None], 0.0)
        keys = values = None
        if self.orthogonal:
            check_factorable(next(self.qkv.parameters()))
        if self.shared_qkv:
            tokens = self.qkv(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, N, P)
        else:
            qkv = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim)
            tokens, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, P) each
            # A norm may return float32 under autocast.
            tokens, keys = (
                norm(t).to(values.dtype) for norm, t in ((self.q_norm, tokens), (self.k_norm, keys))
            )
        if grid_size is not None:
            self._locate(n, source.map_grid, grid_size)  # refuse a wrong one, also where none is needed
        return Heads(tokens, keys, values, token_mask, source.map_grid, grid_size, attn_mask)

    def _represent(
        self, strategy: Callable[..., Any], heads: Heads, *, official: bool = False
    ) -> Representatives:
        """Ask a strategy for representatives of the grid tokens, or of all tokens if it needs no grid."""
        tokens, mask = heads.tokens, heads.token_mask
        grid: GridSize | None = None
        if getattr(strategy, "needs_grid", False):
            located = self._locate(tokens.shape[2], heads.map_grid, heads.grid_size)
            assert located is not None, "a strategy that needs a grid makes its mixer need one"
            grid, first = located
            first = 0 if official else first
            cells = slice(first, first + math.prod(grid))
            tokens, mask = tokens[:, :, cells], None if mask is None else mask[:, cells]
        chosen = strategy(tokens, grid, mask)
        if not isinstance(chosen, Representatives):
            raise TypeError(
                f"representatives must return ops.Representatives(values, mask, attention), "
                f"got {type(chosen).__name__}"
            )
        return chosen

    def _grid_of(self, source: TokenInput, grid_size: GridSize | None) -> GridSize | None:
        """The grid that was passed, else what the model around the layer says, if the layer has none."""
        told = grid_size or self.grid_size or source.map_grid
        if told is not None or not self.needs_grid or self.grid_source is None:
            return grid_size
        return self.grid_source.grid_of(source.tokens)

    def _locate(
        self, n: int, map_grid: GridSize | None, grid_size: GridSize | None
    ) -> tuple[GridSize, int] | None:
        if map_grid is not None:
            if grid_size is not None and check_grid(grid_size) != map_grid:
                raise ValueError(f"grid_size {grid_size} differs from the feature map's {map_grid}")
            return map_grid, 0
        grid_size = self.grid_size if grid_size is None else grid_size
        if grid_size is None and not self.needs_grid:
            return None
        return resolve_grid(n, grid_size, self.num_prefix_tokens)

    def extra_repr(self) -> str:
        """Show the options when the module is printed."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"tied={self.tied}, orthogonal={self.orthogonal}"
        )
