"""CBSA as a layer: projections around :func:`cbsa_torch.ops.cbsa`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch import ops
from cbsa_torch._core.checks import check_choice, check_positive, check_positive_int
from cbsa_torch._core.types import (
    CONTRACTIONS,
    IMPLS,
    LAYOUTS,
    QKV,
    QKVS,
    REPRESENTATIVE_KINDS,
    CBSAStages,
    Contraction,
    GridSize,
    Impl,
    Layout,
    RepresentativeKind,
)
from cbsa_torch.nn.representatives import LearnedRepresentatives, PooledRepresentatives
from cbsa_torch.nn.tokens import TokenInput, as_token_mask, read_tokens, resolve_grid
from cbsa_torch.ops.cbsa.api import DEFAULT_EPS
from cbsa_torch.ops.representatives import check_grid


class CBSA(nn.Module):
    """Contract-and-Broadcast Self-Attention: linear-time attention as a gradient step of a coding rate.

    Project tokens into H subspaces, extract M representatives by cross-attention (Eq. 5), contract them
    (Eq. 7 or 8), broadcast the contractions back with the same attention matrix, project out. The output is
    the update of Eq. 6: use it as ``x + CBSA(norm(x))``.

    Args:
        dim: channels of input and output.
        num_heads: number of subspaces H.
        head_dim: dimension P of each subspace. Default: ``dim / num_heads``.
        num_representatives: M. Pooled: the grid closest in aspect with at most this many cells, never more
            than there are tokens.
        representatives: ``"pool"`` (over the tokens' grid) or ``"learned"`` (parameters; no grid needed).
        contraction: ``"softmax"`` (Eq. 8), ``"exact"`` (Eq. 7), ``"none"``.
        eps: quantisation precision epsilon of the exact contraction.
        tied: project out with the transpose of the input projection (CBSA-dagger, the rigorous form; no
            bias in the output) instead of an independent linear layer.
        qkv: ``"shared"``: one projection is query, key and value, the subspace bases U_k of the paper;
            ``"separate"``: three, as in a ViT (representatives are pooled from the queries).
        num_prefix_tokens: class and register tokens before the grid tokens; they are attended to but not
            pooled. Default: what ``grid_size`` leaves, else 0 or 1, whichever leaves a square grid. Give it
            (or the grid) if your grids are not square: 1 + 2 x 4 tokens also look like 3 x 3.
        grid_size: the tokens' grid, if inputs are tokens of one known size; see :meth:`set_input_size`.
        channels_first: how to read a 3-D input: True = ``(B, C, L)``, False = ``(B, N, C)``, None = tokens
            if its last axis is ``dim``, else a 1-D feature map.
        layout: ``"standard"`` pools the grid tokens. ``"official"`` pools all but the last
            ``num_prefix_tokens`` tokens, as the released checkpoints were trained, although prefix tokens
            come first there too.
        attn_head_dim: timm's name for ``head_dim``.
        dim_out: output channels. Default: ``dim``.
        qkv_bias, proj_bias: biases of the projections.
        qk_norm: normalise queries and keys per head with ``norm_layer``; needs ``qkv="separate"``.
        scale_norm: normalise the heads' joint output with ``norm_layer`` before projecting out.
        gated: not supported; raises.
        attn_drop: not supported; must be 0 (one attention matrix serves two products).
        proj_drop: dropout rate after the output projection.
        norm_layer: constructor of normalisation layers, for ``qk_norm`` and ``scale_norm``.
        impl: implementation of the operator, see :func:`cbsa_torch.ops.cbsa`.
        device, dtype: of the parameters.

    Attributes:
        qkv: the input projection. proj: the output projection (None if tied).
        step_tokens: kappa, ``(H,)``; step_representatives: eta, ``(H,)``. Both learned, any sign, drawn
            from a standard normal as in the official code.

    Shape:
        ``(B, N, C)`` tokens, prefix tokens first, or ``(B, C, *grid)`` with a 1-, 2- or 3-D grid; the
        output has the layout of the input.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        head_dim: int | None = None,
        num_representatives: int = 64,
        representatives: RepresentativeKind = "pool",
        contraction: Contraction = "softmax",
        eps: float = DEFAULT_EPS,
        tied: bool = False,
        qkv: QKV = "shared",
        num_prefix_tokens: int | None = None,
        grid_size: GridSize | None = None,
        channels_first: bool | None = None,
        layout: Layout = "standard",
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
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("dim", dim)
        check_positive_int("num_heads", num_heads)
        check_positive("eps", eps)
        for name, value, choices in (
            ("representatives", representatives, REPRESENTATIVE_KINDS),
            ("contraction", contraction, CONTRACTIONS),
            ("qkv", qkv, QKVS),
            ("layout", layout, LAYOUTS),
            ("impl", impl, IMPLS),
        ):
            check_choice(name, value, choices)
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
        if gated:
            raise ValueError("gated must be False: CBSA has no output gate")
        if attn_drop:
            raise ValueError(f"attn_drop must be 0, got {attn_drop}: dropout on A is not supported")
        if qk_norm and qkv == "shared":
            raise ValueError("qk_norm needs qkv='separate': shared queries, keys and values are one tensor")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("norm_layer is required with qk_norm or scale_norm")
        if layout == "official" and representatives == "learned":
            raise ValueError("layout='official' is a way of pooling; it needs representatives='pool'")
        if tied and (qkv == "separate" or dim_out != dim):
            raise ValueError("tied needs qkv='shared' and dim_out equal to dim: it reuses the input projection")

        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.contraction: Contraction = contraction
        self.eps = eps
        self.tied = tied
        self.shared_qkv = qkv == "shared"
        self.grid_size: GridSize | None = None
        self.num_prefix_tokens: int | None = None
        self.set_input_size(grid_size, num_prefix_tokens)
        self.channels_first = channels_first
        self.layout: Layout = layout
        self.impl: Impl = impl

        inner = num_heads * head_dim
        self.qkv = nn.Linear(dim, inner * (1 if self.shared_qkv else 3), qkv_bias, device, dtype)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.norm: nn.Module = nn.Identity()
        if norm_layer is not None and qk_norm:
            self.q_norm = norm_layer(head_dim, device=device, dtype=dtype)
            self.k_norm = norm_layer(head_dim, device=device, dtype=dtype)
        if norm_layer is not None and scale_norm:
            self.norm = norm_layer(inner, device=device, dtype=dtype)
        self.representatives: PooledRepresentatives | LearnedRepresentatives
        if representatives == "pool":
            self.representatives = PooledRepresentatives(num_representatives)
        else:
            self.representatives = LearnedRepresentatives(
                num_heads, num_representatives, head_dim, device=device, dtype=dtype
            )
        self.step_tokens = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.step_representatives = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype))
        self.proj = None if tied else nn.Linear(inner, dim_out, proj_bias, device, dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self._reset_steps()

    def _reset_steps(self) -> None:
        nn.init.normal_(self.step_tokens)
        nn.init.normal_(self.step_representatives)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for module in (self.qkv, self.proj, self.representatives, self.q_norm, self.k_norm, self.norm):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        self._reset_steps()

    def no_weight_decay(self) -> set[str]:
        """Parameters that should not decay: the step sizes."""
        return {"step_tokens", "step_representatives"}

    def set_input_size(self, grid_size: GridSize | None, num_prefix_tokens: int | None = None) -> None:
        """Set the grid of token inputs (None: assume a square again) and, if given, the prefix tokens."""
        self.grid_size = None if grid_size is None else check_grid(grid_size)
        if num_prefix_tokens is not None:
            if not isinstance(num_prefix_tokens, int) or num_prefix_tokens < 0:
                raise ValueError(f"num_prefix_tokens must be an int of at least 0, got {num_prefix_tokens!r}")
            self.num_prefix_tokens = num_prefix_tokens

    def forward(
        self,
        x: Tensor,
        grid_size: GridSize | None = None,
        token_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend.

        Args:
            x: ``(B, N, C)`` tokens, prefix tokens first, or a ``(B, C, *grid)`` feature map.
            grid_size: the grid of token inputs. Default: the layer's; without it, a square.
            token_mask: ``(B, N)``, or ``(B, *grid)`` for a feature map; bool, True = a real token. The
                others are ignored and get zeros.
            attn_mask: timm's argument; a boolean mask that is the same for every query is read as
                ``token_mask``, anything else raises.
            is_causal: must be False.

        Returns:
            The update, in the layout of ``x``.

        Raises:
            ValueError: channels, a grid or a mask that do not fit; no grid where one is needed;
                ``is_causal``. TypeError: wrong dtypes.
        """
        if is_causal:
            raise ValueError("is_causal must be False: representatives summarise all tokens")
        source, token_mask = self._read(x, token_mask, attn_mask)
        heads = ops.cbsa(**self._operands(source, grid_size, token_mask), impl=self.impl)  # (B, H, N, P)
        out = self.norm(heads.transpose(1, 2).flatten(2))  # (B, N, H * P)
        out = F.linear(out, self.qkv.weight.t()) if self.proj is None else self.proj(out)
        out = self.proj_drop(out)
        if token_mask is not None:
            out = out.masked_fill(~token_mask[..., None], 0.0)  # the biases, too
        return source.restore(out)

    def stages(
        self,
        x: Tensor,
        grid_size: GridSize | None = None,
        token_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> CBSAStages:
        """Every intermediate of :meth:`forward` for the same arguments, computed eagerly, per head."""
        source, token_mask = self._read(x, token_mask, attn_mask)
        return ops.cbsa_stages(**self._operands(source, grid_size, token_mask))

    def token_mask(
        self, x: Tensor, token_mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor | None:
        """The ``(B, N)`` mask that :meth:`forward` uses for these arguments, or None."""
        return self._read(x, token_mask, attn_mask)[1]

    def _read(
        self, x: Tensor, token_mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[TokenInput, Tensor | None]:
        source = read_tokens(x, self.dim, self.channels_first, token_mask)
        if attn_mask is None:
            return source, source.token_mask
        if token_mask is not None:
            raise ValueError("pass token_mask or attn_mask, not both")
        return source, as_token_mask(attn_mask, *source.tokens.shape[:2])

    def _operands(
        self, source: TokenInput, grid_size: GridSize | None, token_mask: Tensor | None
    ) -> dict[str, Any]:
        """The operator's arguments: tokens projected into the heads, representatives, options."""
        x = source.tokens
        b, n, _ = x.shape
        if token_mask is not None:
            # Padding may hold NaN, which the gradient of the projection's weight would carry on.
            x = x.masked_fill(~token_mask[..., None], 0.0)
        if self.shared_qkv:
            tokens = self.qkv(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, N, P)
            keys = values = None
        else:
            qkv = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim)
            tokens, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, P) each
            tokens, keys = self.q_norm(tokens), self.k_norm(keys)
        located = self._locate(n, source.map_grid, grid_size)
        if located is not None and self.representatives.needs_grid:
            grid, first = located
            if self.layout == "official":
                first = 0
            cells = slice(first, first + math.prod(grid))
            grid_mask = None if token_mask is None else token_mask[:, cells]
            chosen = self.representatives(tokens[:, :, cells], grid, grid_mask)
        else:
            chosen = self.representatives(tokens)
        return {
            "tokens": tokens,
            "representatives": chosen.values,
            "keys": keys,
            "values": values,
            "step_representatives": self.step_representatives,
            "step_tokens": self.step_tokens,
            "contraction": self.contraction,
            "eps": self.eps,
            "token_mask": token_mask,
            "representative_mask": chosen.mask,
        }

    def token_grid(self, x: Tensor, grid_size: GridSize | None = None) -> tuple[GridSize, int] | None:
        """The grid that :meth:`forward` uses for ``x`` and the number of prefix tokens before it.

        None if the representatives need no grid and none is given.
        """
        source = read_tokens(x, self.dim, self.channels_first, None)
        return self._locate(source.tokens.shape[1], source.map_grid, grid_size)

    def _locate(
        self, n: int, map_grid: GridSize | None, grid_size: GridSize | None
    ) -> tuple[GridSize, int] | None:
        if map_grid is not None:
            if grid_size is not None and tuple(grid_size) != map_grid:
                raise ValueError(f"grid_size {tuple(grid_size)} differs from the feature map's {map_grid}")
            return map_grid, 0
        grid_size = self.grid_size if grid_size is None else grid_size
        if grid_size is None and not self.representatives.needs_grid:
            return None
        return resolve_grid(n, grid_size, self.num_prefix_tokens)

    def extra_repr(self) -> str:
        """Show the options when the module is printed."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"contraction={self.contraction!r}, tied={self.tied}, layout={self.layout!r}"
        )
