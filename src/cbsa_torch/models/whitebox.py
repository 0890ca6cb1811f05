"""The one Transformer: a stem, layers of (token mixer, feed-forward), a linear head.

The mixer is a parameter, one for all layers or one per layer; the feed-forward is ISTA, or an MLP for the
black-box baseline. Everything else is timm's model surface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from timm.layers import global_pool_nlc
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from cbsa_torch._core.checks import check_choice, check_positive_int, check_sides
from cbsa_torch._core.fx import ScriptableGraph
from cbsa_torch._core.modules import no_weight_decay_inside
from cbsa_torch._core.tracing import pin_image_size
from cbsa_torch._core.types import GridSize, Residual
from cbsa_torch.models.head import HeadedTransformer, check_num_classes
from cbsa_torch.models.packed_images import PackedImages, split_map
from cbsa_torch.models.resize import record_image_size, resample_positions
from cbsa_torch.nn import CBSA, ConvStem, LinearStem, ResidualBlock, WhiteBoxBlock
from cbsa_torch.nn.bands import ImageBand, embed_band
from cbsa_torch.nn.shares import ContextParallelInput, ContextParallelPlan, drop_alike, pool_over_ranks
from cbsa_torch.nn.stem import check_rows
from cbsa_torch.ops.parallel import ContextParallel, Ranks

Mixer = Callable[..., nn.Module]
"""Called as ``mixer(dim, num_heads, head_dim=..., num_prefix_tokens=1, device=..., dtype=...)``."""

STEMS: dict[str, type[ConvStem] | type[LinearStem]] = {"conv": ConvStem, "linear": LinearStem}
ISTA_DEFAULT = 0.1
"""Step size and sparsity of ISTA (CRATE, and the paper, section 4)."""
GLOBAL_POOLS = ("token", "avg", "max", "avgmax", "")
OUTPUT_FORMATS = ("NCHW", "NLC")


class WhiteBoxTransformer(HeadedTransformer):
    """Contract-and-Broadcast Transformer and its relatives (paper, section 4; CRATE's architecture).

    Args:
        img_size: side or ``(height, width)`` in pixels of the images it is built for. Others work at run
            time: position embeddings are interpolated.
        patch_size: side of a patch in pixels; a power of two for the convolutional stem.
        in_chans: image channels.
        num_classes: outputs; 0 for no head.
        global_pool: ``"token"`` (the class token), ``"avg"``, ``"max"``, ``"avgmax"`` or ``""``.
        embed_dim, depth, num_heads, head_dim: sizes; ``head_dim`` defaults to ``embed_dim / num_heads``.
        mixer: a constructor of token mixers, or one per layer.
        stem: ``"conv"``, or ``"linear"``, the patch embedding of the original CRATE.
        mlp_ratio: None for white-box layers with ISTA; a number for the usual layers with an MLP of that many
            times the width, the black-box baseline.
        residual: what the mixer's update is added to, the layer's ``"input"`` or its ``"norm"``. Default: the
            norm if the mixer's step is certified, else the input; see :class:`cbsa_torch.nn.WhiteBoxBlock`. Not
            with ``mlp_ratio``, whose layers add to the input always.
        step_size, sparsity: of ISTA.
        drop_rate: dropout before the head. pos_drop_rate: after the position embedding.
        drop_path_rate: stochastic depth, ``drop_path`` of the last layer; it grows from 0 in the first.
        device, dtype: of the parameters.

    Shape:
        ``(B, in_chans, height, width)`` -> ``(B, num_classes)``.

    A list of images ``(in_chans, height, width)`` of any sizes goes through it as one packed batch, without
    padding: every image gets what it would get alone. Where a batch has a result ``(B, ...)``, a list has a
    list of them, one for each image; logits are ``(B, num_classes)`` for both. In training, batch norms of the
    stem see the pixels of all images together. ``torch.compile`` leaves the layers as they are then.

    Examples:
        >>> from cbsa_torch.models import WhiteBoxTransformer
        >>> model = WhiteBoxTransformer(32, patch_size=4, num_classes=10, embed_dim=64, depth=2, num_heads=4)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> model([torch.randn(3, 20, 28), torch.randn(3, 32, 12)]).shape  # images of any sizes
        torch.Size([2, 10])
    """

    _cp_plan: ClassVar[ContextParallelPlan] = {"": {"x": ContextParallelInput(split_dim=2, expected_dims=4)}}

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        head_dim: int | None = None,
        mixer: Mixer | Sequence[Mixer] = CBSA,
        stem: str = "conv",
        mlp_ratio: float | None = None,
        residual: Residual | None = None,
        step_size: float = ISTA_DEFAULT,
        sparsity: float = ISTA_DEFAULT,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("depth", depth)
        check_num_classes(num_classes)
        if not callable(mixer) and not isinstance(mixer, (list, tuple)):
            raise TypeError(f"mixer must be a constructor or a sequence of them, got {mixer!r}")
        check_choice("global_pool", global_pool, GLOBAL_POOLS)
        check_choice("stem", stem, tuple(STEMS))
        if mlp_ratio is not None and (step_size, sparsity) != (ISTA_DEFAULT, ISTA_DEFAULT):
            raise ValueError("step_size and sparsity are of ISTA, which mlp_ratio replaces by an MLP")
        if mlp_ratio is not None and residual is not None:
            raise ValueError("residual is of layers with ISTA, which mlp_ratio replaces by an MLP")
        if isinstance(drop_path_rate, bool) or not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {drop_path_rate!r}")
        mixers = [mixer] * depth if callable(mixer) else list(mixer)
        if len(mixers) != depth:
            raise ValueError(f"mixer must be one constructor or depth={depth} of them, got {len(mixers)}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False

        self.stem = STEMS[stem](in_chans, embed_dim, patch_size, device=device, dtype=dtype)
        self.grid_size = self.stem.grid_size(check_sides("img_size", img_size))
        length = self.num_prefix_tokens + self.grid_size[0] * self.grid_size[1]
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, device=device, dtype=dtype))
        self.pos_embed = nn.Parameter(torch.empty(1, length, embed_dim, device=device, dtype=dtype))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        prefix = self.num_prefix_tokens
        self.blocks = nn.ModuleList()
        for i, make in enumerate(mixers):
            drop_path = drop_path_rate * i / max(depth - 1, 1)
            attn = make(embed_dim, num_heads, head_dim=head_dim, num_prefix_tokens=prefix, **factory_kwargs)
            if mlp_ratio is None:
                block: nn.Module = WhiteBoxBlock(
                    embed_dim,
                    attn,
                    residual=residual,
                    step_size=step_size,
                    sparsity=sparsity,
                    drop_path=drop_path,
                    **factory_kwargs,
                )
            else:
                block = ResidualBlock(
                    embed_dim, attn, mlp_ratio=mlp_ratio, drop_path=drop_path, **factory_kwargs
                )
            self.blocks.append(block)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": patch_size} for i in range(depth)
        ]
        self.norm: nn.Module = nn.LayerNorm(embed_dim, device=device, dtype=dtype)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = self.make_head(num_classes)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the class token and position embedding from a standard normal, as the official code does.

        The other modules draw their own parameters when they are built.
        """
        nn.init.normal_(self.cls_token)
        nn.init.normal_(self.pos_embed)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay."""
        return {"cls_token", "pos_embed"} | no_weight_decay_inside(self)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into stem and layers (timm: layer-wise rates, freezing)."""
        return {
            "stem": r"^cls_token|pos_embed|stem",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for ``num_classes`` (0: none)."""
        check_num_classes(num_classes)
        if global_pool is not None:
            check_choice("global_pool", global_pool, GLOBAL_POOLS)
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = self.make_head(num_classes)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None
    ) -> None:
        """Resample the position embedding for images of another size, for good.

        The patch size is built into the stem and cannot change.
        """
        if patch_size not in (None, self.stem.patch_size):
            raise ValueError(f"patch_size must stay {self.stem.patch_size}, the stem's; got {patch_size}")
        if img_size is None:
            return
        grid_size = self.stem.grid_size(check_sides("img_size", img_size))
        resampled = self._resampled_pos_embed(grid_size).detach().clone()
        self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        self.grid_size = grid_size
        record_image_size(self, img_size)

    def set_context_parallel(self, ranks: Ranks | None) -> None:
        """Spread the rows of images over ranks; :func:`cbsa_torch.parallel.context_parallel` calls this.

        Raises:
            ValueError: a layer needs all tokens at once, or the stem all rows.
        """
        if ranks is not None:
            check_rows(self.stem)
        super().set_context_parallel(ranks)

    def _resampled_pos_embed(self, grid_size: tuple[int, int]) -> Tensor:
        return resample_positions(self.pos_embed, self.grid_size, grid_size)

    def embed(self, x: Tensor | ImageBand) -> tuple[Tensor, tuple[int, int]]:
        """Images to ``(B, 1 + h * w, embed_dim)`` tokens, class token first, and their grid ``(h, w)``.

        In context parallel, tokens and grid are those of this rank; the first has the class token.
        """
        tokens, grid_size, _ = self._embed_batch(x)
        return tokens, grid_size

    def _embed_batch(self, x: Tensor | ImageBand) -> tuple[Tensor, tuple[int, int], ContextParallel | None]:
        parallel = None
        if self.ranks is not None:
            plan = self._cp_plan[""]["x"]
            group, facts = self.ranks.group, self.shared_facts()
            maps, parallel = embed_band(self.stem, x, group, self.num_prefix_tokens, plan, facts)
            self.ranks_agree = True
        elif isinstance(x, ImageBand):
            raise TypeError(
                "images must be whole: call cbsa_torch.parallel.context_parallel(model, mesh) first"
            )
        else:
            maps = self.stem(pin_image_size(x))
        tokens, grid_size = self._add_positions(maps, parallel)
        return tokens, grid_size, parallel

    def _add_positions(
        self, x: Tensor, parallel: ContextParallel | None = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """A map ``(B, D, h, w)`` to tokens; the rows of this rank to its tokens."""
        grid_size = (x.shape[2], x.shape[3])
        whole: Any = grid_size if parallel is None else parallel.grid_size
        x = x.flatten(2).transpose(1, 2)  # (B, h * w, D)
        prefix, pos_embed = self.cls_token.expand(x.shape[0], -1, -1), self._resampled_pos_embed(whole)
        if parallel is not None:
            here = slice(parallel.start, parallel.start + parallel.length)
            prefix, pos_embed = prefix[:, here], pos_embed[:, here]
        x = torch.cat([prefix, x], dim=1)
        return self.pos_drop(x + pos_embed), grid_size

    def _embed(self, x: Any) -> _Embedded:
        """Images, those of a rank, or a list of images."""
        prefix = self.num_prefix_tokens
        if isinstance(x, (list, tuple)) and not isinstance(x, ImageBand) and self.ranks is None:
            packed = PackedImages(x, self._embed_sizes, prefix)
            return _Embedded(packed.row, (None, None, None, packed.packing), None, prefix, packed)
        tokens, grid_size, parallel = self._embed_batch(x)
        if parallel is None:
            return _Embedded(tokens, (grid_size,), grid_size, prefix)
        # the grid of a rank is no grid for a mixer, which takes that of all from ``parallel``
        where = (None, None, None, None, parallel)
        return _Embedded(tokens, where, grid_size, prefix if parallel.start == 0 else 0)

    def _embed_sizes(self, batches: list[Tensor]) -> list[tuple[Tensor, GridSize]]:
        return [self._add_positions(x) for x in self.stem.forward_list(batches)]

    def _run_block(self, block: nn.Module, x: Tensor, where: tuple[Any, ...]) -> Tensor:
        if self.grad_checkpointing and self.training:
            return checkpoint(block, x, *where)
        return block(x, *where)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of the model: its FX graph, for batches of images.

        Raises:
            ValueError: the model is in context parallel. TypeError: a layer that cannot be compiled, and why.
        """
        if self.ranks is not None:
            raise ValueError("model must not be in context parallel: TorchScript has no processes")
        return ScriptableGraph(self)

    def forward_intermediates(
        self,
        x: Any,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Features of chosen layers; arguments and results as in timm's VisionTransformer.

        Args:
            x: images, or a list of them: every feature map is then a list, one for each image.
            indices: the last n layers if an int, all if None, else these.
            return_prefix_tokens: also return the class token of each.
            norm: apply the final norm to each.
            stop_early: do not compute layers after the last one asked for.
            output_fmt: ``"NCHW"`` or ``"NLC"``.
            intermediates_only: return only the list.
            output_dict: return a dictionary.

        In context parallel these are the rows and tokens of this rank; the first has the class token.
        """
        check_choice("output_fmt", output_fmt, OUTPUT_FORMATS)
        take, last = feature_take_indices(len(self.blocks), indices)
        embedded = self._embed(x)
        x = embedded.tokens
        found = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self._run_block(block, x, embedded.where)
            if i in take:
                found.append(self.norm(x) if norm else x)
        maps = [embedded.maps(y, output_fmt) for y in found]
        features: list[Any] = [patches for patches, _ in maps]
        prefix: list[Any] = [tokens for _, tokens in maps]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": features}
            if return_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = embedded.of_images(self.norm(x))
            return result
        intermediates: list[Any] = (
            list(zip(features, prefix, strict=True)) if return_prefix_tokens else features
        )
        return intermediates if intermediates_only else (embedded.of_images(self.norm(x)), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the chosen intermediates do not need; returns their indices."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Any) -> Any:
        """Images to normalised tokens ``(B, 1 + h * w, embed_dim)``; a list of images to a list of tokens.

        In context parallel, tokens are those of this rank.
        """
        embedded = self._embed(x)
        x = embedded.tokens
        for block in self.blocks:
            x = self._run_block(block, x, embedded.where)
        return embedded.of_images(self.norm(x))

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens to one feature per image; in context parallel the same on every rank."""
        pool_type = self.global_pool if pool_type is None else pool_type
        if self.ranks is not None and pool_type:
            return pool_over_ranks(x, pool_type, self.num_prefix_tokens, self.ranks.group)
        return global_pool_nlc(x, pool_type=pool_type, num_prefix_tokens=self.num_prefix_tokens)

    def forward_head(self, x: Any, pre_logits: bool = False) -> Any:
        """Tokens to logits (or, ``pre_logits``, to the features before the linear head).

        A list of tokens of images gives one tensor, too, unless tokens are not pooled.
        """
        if isinstance(x, (list, tuple)):
            if not self.global_pool:
                return [self.forward_head(tokens[None], pre_logits)[0] for tokens in x]
            x = torch.cat([self.pool(tokens[None]) for tokens in x])
        else:
            x = self.pool(x)
        x = self.head_drop(x) if self.ranks is None else drop_alike(self.head_drop, x, self.ranks.group)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor | ImageBand | Sequence[Tensor]) -> Tensor:
        """Images, or a list of images of any sizes, to logits; in context parallel on every rank."""
        logits: Tensor = self.forward_head(self.forward_features(x))
        return logits


# FX writes annotations into its graphs, where these, which are strings, would be no types.
WhiteBoxTransformer.forward.__annotations__ = {}


class _Embedded(NamedTuple):
    """What the stem made of images, and what layers are called with."""

    tokens: Tensor
    """``(B, N, D)``; of a list of images ``(1, T, D)``."""
    where: tuple[Any, ...]
    """The arguments of a layer after the tokens."""
    grid_size: GridSize | None
    """Of the tokens, in context parallel of those of this rank; None for a list of images."""
    num_prefix_tokens: int
    """In front of those of the grid; in context parallel only the first rank has any."""
    packed: PackedImages | None = None
    """The list of images, if there is one."""

    def of_images(self, x: Tensor) -> Any:
        """Tokens as the model returns them: of a list of images as a list."""
        return x if self.packed is None else self.packed.split(x)

    def maps(self, x: Tensor, output_fmt: str) -> tuple[Any, Any]:
        """The patches of tokens, as a map or as tokens, and the prefix tokens; of a list of images as lists."""
        if self.packed is not None:
            return self.packed.split_maps(x, output_fmt)
        assert self.grid_size is not None, "a batch"
        return split_map(x, self.num_prefix_tokens, self.grid_size, output_fmt)
