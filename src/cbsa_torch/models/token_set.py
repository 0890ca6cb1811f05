"""A Transformer for sets of features, such as the tiles of a slide: tokens at coordinates, not on a grid."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cbsa_torch._core.checks import check_bool, check_choice, check_floating, check_mask, check_positive_int
from cbsa_torch._core.modules import no_weight_decay_inside
from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch._core.types import Residual
from cbsa_torch.models.head import HeadedTransformer, check_num_classes
from cbsa_torch.models.whitebox import ISTA_DEFAULT, Mixer
from cbsa_torch.nn import (
    CBSA,
    MHSA,
    MSSA,
    TSSA,
    AgentAttention,
    Coordinates,
    LinearCBSA,
    Packing,
    ResidualBlock,
    TokenMixer,
    WhiteBoxBlock,
)
from cbsa_torch.nn.scripted import not_scriptable
from cbsa_torch.nn.shares import (
    ContextParallelInput,
    ContextParallelPlan,
    SetSlice,
    drop_alike,
    pool_over_ranks,
    take_slice,
)
from cbsa_torch.ops.coordinates import check_coords, place_in_box
from cbsa_torch.ops.packing import read_cu_seqlens

MIXERS: dict[str, type[TokenMixer]] = {
    "cbsa": CBSA,
    "agent": AgentAttention,
    "linear_cbsa": LinearCBSA,
    "tssa": TSSA,
    "mssa": MSSA,
    "mhsa": MHSA,
}
POSITIONS = ("none", "sincos", "fourier")
LOWEST, HIGHEST = 0.5, 64.0
"""Frequencies of positions, in periods over the longest side of the bounding box."""
FOURIER_SCALE = 8.0
"""Standard deviation of the random frequencies of ``positions="fourier"``, in the same unit."""


class TokenSetTransformer(HeadedTransformer):
    """White-box layers over a set of features at coordinates: a bag of tiles to one embedding, and to logits.

    A linear layer and a norm embed the features, the code of their coordinates is added, a class token is put
    before them, and layers of (token mixer, ISTA) follow. With linear mixers nothing of size N x N is made.

    Args:
        in_dim: width of the features.
        num_classes: outputs; 0 for no head.
        dim, depth, num_heads, head_dim: sizes of the layers; ``head_dim`` defaults to ``dim / num_heads``.
        mixer: a name of :data:`MIXERS`, or a constructor called as
            ``mixer(dim, num_heads, head_dim=..., num_prefix_tokens=1, device=..., dtype=..., **mixer_args)``.
        positions: what is added to the tokens for their coordinates. ``"none"``: nothing, a set proper.
            ``"sincos"``: sines and cosines of each coordinate, with frequencies from 1/2 to 64 periods over the
            longest side of the bounding box. ``"fourier"``: a learned linear map of sines and cosines of fixed
            random directions (Tancik et al. 2020, arXiv:2006.10739). Coordinates are measured from the corner
            of the bounding box of the real tokens, in its longest side: their unit and origin do not matter.
        coord_dim: axes of the coordinates, 1 to 3.
        mlp_ratio: None for white-box layers with ISTA; a number for the usual layers with an MLP of that many
            times the width, the black-box baseline.
        residual: what the mixer's update is added to, see :class:`cbsa_torch.nn.WhiteBoxBlock`. Not with
            ``mlp_ratio``.
        step_size, sparsity: of ISTA.
        drop_rate: dropout before the head.
        recompute: keep only the input of every layer for the backward pass, N * dim numbers, and compute the
            rest again there.
        device, dtype: of the parameters.
        **mixer_args: of the mixer, e.g. ``num_representatives``. CBSA has ``step="relative"`` here unless told
            otherwise: with a free step little reaches the class token of a large set.

    Shape:
        ``(B, N, in_dim)`` -> ``(B, num_classes)``, or, with ``cu_seqlens``, ``(1, N_1 + ... + N_B, in_dim)`` ->
        ``(B, num_classes)``.

    Examples:
        >>> from cbsa_torch.models import TokenSetTransformer
        >>> model = TokenSetTransformer(in_dim=1536, num_classes=2, dim=64, depth=2, num_heads=4)
        >>> model(torch.randn(1, 300, 1536), torch.rand(1, 300, 2)).shape
        torch.Size([1, 2])
    """

    _cp_plan: ClassVar[ContextParallelPlan] = {
        "": {"features": ContextParallelInput(split_dim=1, expected_dims=3)}
    }

    def __init__(
        self,
        in_dim: int,
        num_classes: int = 2,
        dim: int = 384,
        depth: int = 4,
        num_heads: int = 6,
        *,
        head_dim: int | None = None,
        mixer: str | Mixer = "cbsa",
        positions: str = "sincos",
        coord_dim: int = 2,
        mlp_ratio: float | None = None,
        residual: Residual | None = None,
        step_size: float = ISTA_DEFAULT,
        sparsity: float = ISTA_DEFAULT,
        drop_rate: float = 0.0,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **mixer_args: Any,
    ) -> None:
        super().__init__()
        for name, value in (("in_dim", in_dim), ("dim", dim), ("depth", depth), ("coord_dim", coord_dim)):
            check_positive_int(name, value)
        check_num_classes(num_classes)
        check_choice("positions", positions, POSITIONS)
        check_bool("recompute", recompute)
        if coord_dim > 3:
            raise ValueError(f"coord_dim must be 1, 2 or 3, got {coord_dim}")
        if positions == "sincos" and dim < 2 * coord_dim:
            raise ValueError(
                f"positions='sincos' needs a dim of at least 2 * coord_dim = {2 * coord_dim}, got {dim}"
            )
        if mlp_ratio is not None and (residual, step_size, sparsity) != (None, ISTA_DEFAULT, ISTA_DEFAULT):
            raise ValueError(
                "residual, step_size and sparsity are of layers with ISTA, which mlp_ratio replaces"
            )
        if isinstance(mixer, str):
            check_choice("mixer", mixer, tuple(MIXERS))
            mixer = MIXERS[mixer]
        if mixer is CBSA:
            mixer_args = {"step": "relative", **mixer_args}
        if not callable(mixer):
            raise TypeError(f"mixer must be a name or a constructor, got {mixer!r}")
        self.in_dim = in_dim
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.num_prefix_tokens = 1
        self.global_pool = "token"
        self.positions = positions
        self.coord_dim = coord_dim
        self.grad_checkpointing = recompute

        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        # The norm comes after the projection: before it, it would copy the features, the largest tensor of all.
        self.embed = nn.Sequential(
            nn.Linear(in_dim, dim, **factory_kwargs), nn.LayerNorm(dim, **factory_kwargs)
        )
        self.directions: Tensor | None
        self.position_proj: nn.Linear | None = None
        drawn = None
        if positions == "fourier":
            drawn = torch.empty(coord_dim, dim // 2, **factory_kwargs)
            self.position_proj = nn.Linear(2 * (dim // 2), dim, **factory_kwargs)
        self.register_buffer("directions", drawn)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory_kwargs))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            attn = mixer(dim, num_heads, head_dim=head_dim, num_prefix_tokens=1, **factory_kwargs, **mixer_args)
            if mlp_ratio is None:
                block: nn.Module = WhiteBoxBlock(
                    dim, attn, residual=residual, step_size=step_size, sparsity=sparsity, **factory_kwargs
                )
            else:
                block = ResidualBlock(dim, attn, mlp_ratio=mlp_ratio, **factory_kwargs)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(dim, **factory_kwargs)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = self.make_head(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the class token and the directions of positions; other modules draw their own parameters."""
        nn.init.normal_(self.cls_token)
        if self.directions is not None:
            nn.init.normal_(self.directions, std=FOURIER_SCALE)
            self.directions.copy_(self.directions.bfloat16())  # so that models in bfloat16 have the same

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay."""
        return {"cls_token"} | no_weight_decay_inside(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into embedding and layers (timm: layer-wise rates, freezing)."""
        return {
            "stem": r"^cls_token|^embed|^position_proj",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse TorchScript: ``TypeError``."""
        raise not_scriptable(self, "what it does with coordinates and packed sets has no form for TorchScript")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for ``num_classes`` (0: none); the class token stays what is read."""
        check_num_classes(num_classes)
        if global_pool not in (None, "token"):
            raise ValueError(f"global_pool must be 'token', got {global_pool!r}")
        self.num_classes = num_classes
        self.head = self.make_head(num_classes)

    @property
    def needs_coords(self) -> bool:
        """Whether coordinates must be given: for positions, or for representatives made from places."""
        return self.positions != "none" or any(
            getattr(module, "needs_grid", False) for module in self.modules() if isinstance(module, TokenMixer)
        )

    def forward_features(
        self,
        features: Tensor | SetSlice,
        coords: Tensor | None = None,
        token_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Features to normalised tokens, the class token first; arguments as of :meth:`forward`.

        Returns:
            ``(B, 1 + N, dim)``; with ``cu_seqlens`` ``(1, N_1 + ... + N_B + B, dim)``, where every set has its
            class token before it. In context parallel the tokens of this rank; the first has the class token.
        """
        if self.ranks is not None:
            return self._shared(features, coords, token_mask, cu_seqlens, self.ranks.group)
        if isinstance(features, SetSlice):
            raise TypeError(
                "features must be whole: call cbsa_torch.parallel.context_parallel(model, mesh) first"
            )
        self._check(features, coords, token_mask)
        if cu_seqlens is not None:
            if token_mask is not None:
                raise ValueError("pass token_mask or cu_seqlens, not both: packed sets have no padding")
            return self._packed(features, coords, cu_seqlens)
        mask = None
        if token_mask is not None:
            mask = F.pad(token_mask, (1, 0), value=True)
            # Padding may hold NaN, which the gradient of the embedding's weight would carry on.
            features = features.masked_fill(~token_mask[..., None], 0.0)
        # made once, so that cells are searched once and not by every layer
        places = None if coords is None else Coordinates(coords)
        # tokens are handed on without a name: a name would keep those before the first layer
        return self._layers(self._embedded(features, coords, token_mask), token_mask=mask, coords=places)

    def _shared(
        self,
        features: Tensor | SetSlice,
        coords: Tensor | None,
        token_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """:meth:`forward_features` of this rank's features, after all ranks have agreed that they can."""

        def check(whole: Tensor) -> None:
            if cu_seqlens is not None:
                raise ValueError(
                    "cu_seqlens must be None in context parallel: give a set at a time, or a batch"
                )
            self._check(whole, coords, token_mask, is_whole=not isinstance(features, SetSlice))

        plan, prefix = self._cp_plan[""]["features"], self.num_prefix_tokens
        whole, facts = {"coords": coords, "token_mask": token_mask}, self.shared_facts()
        own, parallel = take_slice(features, check, whole, plan, group, prefix, facts)
        self.ranks_agree = True
        begin, end = (max(0, parallel.start + k - prefix) for k in (0, parallel.length))
        mask = None if token_mask is None else F.pad(token_mask, (prefix, 0), value=True)
        if mask is not None and token_mask is not None:
            mask = mask[:, parallel.start : parallel.start + parallel.length]
            own = own.masked_fill(~token_mask[:, begin:end, None], 0.0)
        places = None if coords is None else Coordinates(coords, token_mask)
        placed = self.placed(coords, token_mask)
        x = self.embed_tokens(own, None if placed is None else placed[:, begin:end])
        first = self.cls_token[:, parallel.start : parallel.start + parallel.length].expand(x.shape[0], -1, -1)
        return self._layers(torch.cat([first, x], 1), token_mask=mask, coords=places, parallel=parallel)

    def _embedded(self, features: Tensor, coords: Tensor | None, token_mask: Tensor | None) -> Tensor:
        """The tokens of a batch before the first layer, ``(B, 1 + N, dim)``."""
        x = self.embed_tokens(features, self.placed(coords, token_mask))
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)

    def placed(self, coords: Tensor | None, token_mask: Tensor | None = None) -> Tensor | None:
        """Of whole sets: coordinates in their bounding box, if the model adds positions."""
        if coords is None or self.positions == "none":
            return None
        return place_in_box(coords, token_mask=token_mask)

    def embed_tokens(self, features: Tensor, placed: Tensor | None) -> Tensor:
        """Any features of sets to tokens, positions added: ``(B, n, in_dim)`` to ``(B, n, dim)``.

        Args:
            features: of some tokens.
            placed: theirs of :meth:`placed`, ``(B, n, coord_dim)``.
        """
        x = self.embed(features)
        return x if placed is None else x + self._position_code(placed).to(x.dtype)

    def _packed(self, features: Tensor, coords: Tensor | None, cu_seqlens: Tensor) -> Tensor:
        """:meth:`forward_features` of several sets in one row."""
        lengths = _lengths(cu_seqlens, features)
        class_tokens = torch.arange(len(cu_seqlens), device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        packing = Packing(cu_seqlens + class_tokens, coords=coords, num_prefix_tokens=1)
        return self._layers(self._embedded_row(features, coords, lengths), cu_seqlens=packing)

    def _embedded_row(self, features: Tensor, coords: Tensor | None, lengths: list[int]) -> Tensor:
        """The same of packed sets, ``(1, N_1 + ... + N_B + B, dim)``."""
        parts = self.embed(features)[0].split(lengths)
        if coords is not None and self.positions != "none":
            codes = (self._position_code(place_in_box(own))[0] for own in coords.split(lengths, dim=1))
            parts = tuple(part + code.to(part.dtype) for part, code in zip(parts, codes, strict=True))
        return torch.cat([piece for part in parts for piece in (self.cls_token[0], part)])[None]

    def _layers(self, x: Tensor, **options: Any) -> Tensor:
        """All layers and the final norm."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, **options)
            else:
                x = block(x, **options)
        return self.norm(x)

    def _position_code(self, placed: Tensor) -> Tensor:
        """Places in the box of a set ``(B, n, coord_dim)`` to ``(B, n, dim)``, see ``positions``."""
        if self.positions == "fourier":
            assert self.directions is not None
            assert self.position_proj is not None
            dtype = compute_dtype(self.directions.dtype)  # in a lower one, tiles would share their angles
            with no_autocast(placed):
                angles = 2 * math.pi * (placed.to(dtype) @ self.directions.to(dtype))
            return self.position_proj(torch.cat([angles.sin(), angles.cos()], -1).to(self.directions.dtype))
        number = self.embed_dim // (2 * self.coord_dim)
        steps = torch.linspace(0, 1, number, device=placed.device)
        angles = 2 * math.pi * placed[..., None] * (LOWEST * (HIGHEST / LOWEST) ** steps)
        code = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., N, 2 * coord_dim * number)
        return F.pad(code, (0, self.embed_dim - code.shape[-1]))

    def forward_head(self, x: Tensor, pre_logits: bool = False, cu_seqlens: Tensor | None = None) -> Tensor:
        """Tokens of :meth:`forward_features` to logits (or, ``pre_logits``, to the embedding, ``(B, dim)``)."""
        if self.ranks is not None:
            embedding = pool_over_ranks(x, "token", self.num_prefix_tokens, self.ranks.group)
            embedding = drop_alike(self.head_drop, embedding, self.ranks.group)
            return embedding if pre_logits else self.head(embedding)
        if cu_seqlens is None:
            embedding = x[:, 0]
        else:
            starts = cu_seqlens[:-1] + torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
            embedding = x[0, starts]
        embedding = self.head_drop(embedding)
        return embedding if pre_logits else self.head(embedding)

    def forward(
        self,
        features: Tensor | SetSlice,
        coords: Tensor | None = None,
        token_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Sets of features to logits; in context parallel on every rank.

        Args:
            features: ``(B, N, in_dim)``, or ``(1, N_1 + ... + N_B, in_dim)`` with ``cu_seqlens``. In context
                parallel, whole sets or a :class:`cbsa_torch.parallel.SetSlice`; the rest is of all ranks.
            coords: ``(B, N, coord_dim)`` the place of every feature in any unit, integer or float. None: for a
                model that needs none, see :attr:`needs_coords`.
            token_mask: ``(B, N)`` bool, True = a real token; the others have no effect, whatever they hold.
            cu_seqlens: ``(B + 1,)`` int32 or int64, where the sets of one packed row begin and end, from 0.

        Returns:
            ``(B, num_classes)``.

        Raises:
            ValueError: shapes that do not fit, coordinates that are missing or not finite, ``cu_seqlens`` that
                do not cover the row. TypeError: wrong dtypes.
        """
        x = self.forward_features(features, coords, token_mask, cu_seqlens)
        return self.forward_head(x, cu_seqlens=cu_seqlens)

    def _check(
        self, features: Tensor, coords: Tensor | None, token_mask: Tensor | None, is_whole: bool = True
    ) -> None:
        """Raise unless they fit each other; a rank's features have less rows than there are coordinates."""
        check_floating("features", features)
        if features.ndim != 3 or features.shape[2] != self.in_dim:
            raise ValueError(
                f"features must be (B, N, in_dim) with in_dim {self.in_dim}, got shape {tuple(features.shape)}"
            )
        if token_mask is not None:
            size = features.shape[:2] if is_whole else (features.shape[0], None)
            check_mask("token_mask", token_mask, size, "(B, N)", "a real token", ("features", features))
        if coords is None:
            if self.needs_coords:
                raise ValueError(
                    f"coords must be given to this model (positions={self.positions!r}); positions='none' with "
                    "representatives='learned' needs none"
                )
            return
        check_coords(coords)
        # of how many tokens in all a rank's features are a part, all ranks say together
        number = features.shape[1] if is_whole else coords.shape[1]
        if tuple(coords.shape) != (features.shape[0], number, self.coord_dim):
            raise ValueError(
                f"coords must have shape {(*features.shape[:2], self.coord_dim)}, a row of coord_dim for every "
                f"feature; got {tuple(coords.shape)}"
            )


def _lengths(cu_seqlens: Tensor, features: Tensor) -> list[int]:
    """The lengths of packed sets; raises ValueError or TypeError unless these cover the one row of features."""
    ends = read_cu_seqlens("cu_seqlens", cu_seqlens)
    if len(ends) < 2 or features.shape[0] != 1:
        raise ValueError(
            "cu_seqlens must have shape (B + 1,) beside features (1, sum of N, in_dim), got "
            f"{tuple(cu_seqlens.shape)} and {tuple(features.shape)}"
        )
    if ends[-1] != features.shape[1]:
        raise ValueError(f"cu_seqlens must end at the number of features ({features.shape[1]}), got {ends[-1]}")
    return [stop - start for start, stop in itertools.pairwise(ends)]
