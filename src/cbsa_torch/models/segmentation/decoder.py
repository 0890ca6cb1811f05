"""The decoder of semantic segmentation: class embeddings mixed with patch features, masks by cosine similarity.

The official code appends the class embeddings to the patches; here they come first, as prefix tokens do
everywhere in this library. Attention does not depend on the order of tokens and pooling sees the patches alone
in both, so the masks are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from cbsa_torch._core.checks import check_bool, check_choice, check_floating, check_positive_int
from cbsa_torch._core.modules import no_weight_decay_inside
from cbsa_torch._core.precision import compute_dtype, no_autocast
from cbsa_torch._core.types import GridSize, Residual
from cbsa_torch.models.packed_images import PackedImages
from cbsa_torch.nn import CBSA, MHSA, MSSA, TSSA, AgentAttention, LinearCBSA, Packing, TokenMixer
from cbsa_torch.nn.block import residual_around

MIXERS: dict[str, type[nn.Module]] = {
    "cbsa": CBSA,
    "mssa": MSSA,
    "mhsa": MHSA,
    "tssa": TSSA,
    "linear_cbsa": LinearCBSA,
    "agent": AgentAttention,
}
"""Token mixers by name: CBT's decoder, DEPICT's, Segmenter's, and the rest of the family."""
Mixer = str | Callable[..., nn.Module]

HEAD_DIM = 100
"""Width of a head in the official decoders of every size."""
NUM_REPRESENTATIVES = 100
"""A 10 x 10 grid in the official decoder."""


def default_num_heads(dim: int) -> int:
    """Heads of a decoder of this width: 3 up to 384 channels, 6 for 768, 9 for 1024.

    The paper does not print them; with heads of dimension 100 these give its decoder FLOPs at every size.
    """
    return 3 * max(1, round(dim / 384))


class MaskTransformerDecoder(nn.Module):
    """Masks from patch features: layers x <- x + mixer(LN(x)) without feed-forward (paper, section 4).

    Patch features and learned class embeddings go through the layers together; a mask is the cosine similarity
    of every patch with a class, normalised over classes. With CBSA it is CBT's decoder, with MSSA that of
    DEPICT (arXiv 2411.03033), with MHSA that of Segmenter (arXiv 2105.05633) less its feed-forward.

    Args:
        num_classes: K. With one class there is nothing to normalise over: its mask is the similarity, scaled
            and shifted, to be read as the logit of a sigmoid.
        dim: channels.
        depth: layers.
        num_heads: of the mixer. Default: 3, 6 or 9, by ``dim``; see :func:`default_num_heads`.
        head_dim: dimension of each. None: ``dim / num_heads``.
        mixer: a name of :data:`MIXERS`, or a constructor called as
            ``mixer(dim, num_heads, head_dim=..., num_prefix_tokens=K, device=..., dtype=..., **options)``;
            :meth:`reset_classes` also calls its ``set_input_size(None, K)``.
        encoder_dim: channels of the features. Default: ``dim``; otherwise a linear layer comes first.
        learned_step: a learned step size per layer, x <- x + step * mixer(LN(x)), standard normal at first, as
            in DEPICT. The steps of CBSA are its own; beside a certified step another is refused.
        residual: what the update is added to: ``"input"``, x, or ``"norm"``, LN(x). Default: the norm if the
            mixer's step is certified, else the input.
        device, dtype: of the parameters.
        **options: of the mixer, e.g. ``tied``, ``contraction``, ``num_representatives`` (default 100: pooled
            over the grid of patches alone, 10 x 10 if it is a square; the official code has ``(10, 10)`` at any
            aspect).

    Shape:
        ``(B, encoder_dim, h, w)`` features -> ``(B, K, h, w)`` masks, or ``(B, K, *size)`` if given a size.
        A list of features ``(encoder_dim, h, w)`` of any grids -> a list of masks: one packed batch without
        padding, in which each gets what it would get alone. For the mixers of this library.

    Examples:
        >>> from cbsa_torch.models import MaskTransformerDecoder
        >>> decoder = MaskTransformerDecoder(num_classes=5, dim=64, num_heads=2, head_dim=32)
        >>> decoder(torch.randn(1, 64, 8, 6)).shape, decoder(torch.randn(1, 64, 8, 6), (32, 24)).shape
        (torch.Size([1, 5, 8, 6]), torch.Size([1, 5, 32, 24]))
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        depth: int = 3,
        num_heads: int | None = None,
        head_dim: int | None = HEAD_DIM,
        *,
        mixer: Mixer = "cbsa",
        encoder_dim: int | None = None,
        learned_step: bool = False,
        residual: Residual | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        encoder_dim = dim if encoder_dim is None else encoder_dim
        for name, value in (("num_classes", num_classes), ("dim", dim), ("depth", depth)):
            check_positive_int(name, value)
        check_positive_int("encoder_dim", encoder_dim)
        check_bool("learned_step", learned_step)
        if "num_prefix_tokens" in options:
            raise TypeError("num_prefix_tokens is no option here: the class embeddings are the prefix tokens")
        num_heads = default_num_heads(dim) if num_heads is None else num_heads
        if isinstance(mixer, str):
            check_choice("mixer", mixer, tuple(MIXERS))
            mixer = MIXERS[mixer]
        if not callable(mixer):
            raise TypeError(f"mixer must be a name or a constructor, got {mixer!r}")
        counts = inspect.isclass(mixer) and issubclass(mixer, (CBSA, AgentAttention))
        if counts and options.get("representatives", "pool") in ("pool", "learned"):
            options.setdefault("num_representatives", NUM_REPRESENTATIVES)
        self.num_classes = num_classes
        self.dim = dim
        self.encoder_dim = encoder_dim
        factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input_proj: nn.Module = nn.Identity()
        if encoder_dim != dim:
            self.input_proj = nn.Linear(encoder_dim, dim, **factory_kwargs)
        self.class_embed = nn.Parameter(torch.empty(1, num_classes, dim, **factory_kwargs))
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attn = mixer(
                dim, num_heads, head_dim=head_dim, num_prefix_tokens=num_classes, **factory_kwargs, **options
            )
            self.layers.append(
                DecoderLayer(dim, attn, learned_step=learned_step, residual=residual, **factory_kwargs)
            )
        self.norm = nn.LayerNorm(dim, **factory_kwargs)
        self.similarity = CosineSimilarity()
        self.mask_norm: nn.Module = _class_norm(num_classes, **factory_kwargs)
        self.init_weights()

    def init_weights(self) -> None:
        """Linear layers and class embeddings from a normal of deviation 0.02, truncated; biases at zero.

        The step sizes are drawn from a standard normal where they are made, all as in the official code.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and not parametrize.is_parametrized(module):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.class_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: class embeddings and step sizes."""
        return {"class_embed"} | no_weight_decay_inside(self)

    def reset_classes(self, num_classes: int) -> None:
        """Start with other classes: new embeddings and a new norm over them; the layers stay."""
        check_positive_int("num_classes", num_classes)
        for layer in self.layers:
            if not hasattr(layer.attn, "set_input_size"):
                raise TypeError(
                    f"mixer {type(layer.attn).__name__} cannot be told another number of classes: give it a "
                    "method set_input_size(grid, num_prefix_tokens), as those of cbsa_torch.nn have"
                )
        like = self.class_embed
        factory_kwargs: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        self.num_classes = num_classes
        self.class_embed = nn.Parameter(torch.empty(1, num_classes, self.dim, **factory_kwargs))
        nn.init.trunc_normal_(self.class_embed, std=0.02)
        self.mask_norm = _class_norm(num_classes, **factory_kwargs)
        for layer in self.layers:
            layer.attn.set_input_size(None, num_classes)  # type: ignore[operator, union-attr]

    def forward(self, features: Any, size: Any = None) -> Any:
        """Masks of ``(B, encoder_dim, h, w)`` features, or of a list of ``(encoder_dim, h, w)``.

        Args:
            features: of the patches, any grid.
            size: ``(height, width)`` to upsample the masks to, bilinearly; of a list a list of them. Default:
                the grid.

        Returns:
            ``(B, K, h, w)`` or ``(B, K, height, width)`` logits, or a list of them without B.

        Raises:
            ValueError: features of another shape. TypeError: features that are not floating-point; a list with
                mixers that do not take packed sequences.
        """
        if isinstance(features, (list, tuple)):
            return self._forward_list(features, size)
        self._check("features", features, 4, f"(B, {self.encoder_dim}, h, w)")
        x, grid_size = self._embed(features)
        for layer in self.layers:
            x = layer(x, grid_size)
        x = self.norm(x)
        return self._upsampled(x[:, self.num_classes :], x[:, : self.num_classes], grid_size, size)

    def _forward_list(
        self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None
    ) -> list[Tensor]:
        for each in features:
            self._check("each of a list of features", each, 3, f"({self.encoder_dim}, h, w)")
        for layer in self.layers:
            if not isinstance(layer.attn, TokenMixer):
                raise TypeError(
                    f"features must be a batch, not a list, for the mixer {type(layer.attn).__name__}, which "
                    "takes no packed sequences: give images of one size, or build the decoder with a mixer of "
                    "cbsa_torch.nn"
                )
        packed = PackedImages(
            features, lambda batches: [self._embed(batch) for batch in batches], self.num_classes
        )
        x = packed.row
        for layer in self.layers:
            x = layer(x, packed.packing)
        found = zip(*packed.split_maps(self.norm(x), "NLC"), packed.grids, strict=True)
        return [
            self._upsampled(patches[None], classes[None], grid, None if sizes is None else sizes[i])[0]
            for i, (patches, classes, grid) in enumerate(found)
        ]

    def _check(self, name: str, features: Tensor, axes: int, shape: str) -> None:
        check_floating(name, features)
        if features.ndim != axes or features.shape[-3] != self.encoder_dim:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(features.shape)}")

    def _embed(self, features: Tensor) -> tuple[Tensor, GridSize]:
        """Features ``(B, encoder_dim, h, w)`` to tokens ``(B, K + h * w, dim)``, the classes first."""
        b, _, height, width = features.shape
        patches = self.input_proj(features.flatten(2).transpose(1, 2))  # (B, h * w, dim)
        x = torch.cat([self.class_embed.expand(b, -1, -1).to(patches.dtype), patches], dim=1)
        return x, (height, width)

    def _upsampled(
        self, patches: Tensor, classes: Tensor, grid_size: GridSize, size: tuple[int, int] | None
    ) -> Tensor:
        """Masks ``(B, K, h, w)`` of patches and classes, or ``(B, K, *size)``."""
        # interpolation takes twice as long with the classes last
        masks = self.masks(patches, classes).transpose(1, 2).unflatten(2, grid_size).contiguous()
        return masks if size is None else F.interpolate(masks, size=size, mode="bilinear")

    def masks(self, patches: Tensor, classes: Tensor) -> Tensor:
        """Logits ``(B, N, K)`` of ``(B, N, dim)`` patches and ``(B, K, dim)`` classes, both after the norm."""
        return self.mask_norm(self.similarity(patches, classes).to(self.class_embed.dtype))


class DecoderLayer(nn.Module):
    """x <- x + step * attn(norm(x)), or norm(x) + step * attn(norm(x)); the step is 1 or learned.

    Args:
        dim: channels.
        attn: a token mixer, called as ``attn(x, grid_size)``, or with ``cu_seqlens`` for packed images.
        learned_step: whether the step is a parameter.
        residual: as for :class:`MaskTransformerDecoder`.
        device, dtype: of the parameters made here (not of ``attn``).
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        learned_step: bool = False,
        residual: Residual | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if learned_step and getattr(attn, "step", None) == "certified":
            raise ValueError("learned_step must be False with step='certified', whose length is its own")
        self.residual = residual_around(attn, residual)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.attn = attn
        self.step: nn.Parameter | None = None
        if learned_step:
            self.step = nn.Parameter(torch.randn(1, device=device, dtype=dtype))

    def no_weight_decay(self) -> set[str]:
        """The step should not decay."""
        return set() if self.step is None else {"step"}

    def forward(self, x: Tensor, grid_size: GridSize | Packing) -> Tensor:
        """Transform ``(B, N, dim)`` tokens, prefix tokens first, or packed ones; same shape."""
        normed = self.norm(x)
        packed = isinstance(grid_size, Packing)
        update = self.attn(normed, cu_seqlens=grid_size) if packed else self.attn(normed, grid_size)
        return self.apply_update(x, normed, update)

    def apply_update(self, x: Tensor, normed: Tensor, update: Tensor) -> Tensor:
        """What :meth:`forward` makes of x, norm(x) and attn(norm(x))."""
        update = update if self.step is None else self.step * update
        return (normed if self.residual == "norm" else x) + update


class CosineSimilarity(nn.Module):
    """Cosines between patches and classes, in float32 at least: a norm over classes magnifies what is lost."""

    def forward(self, patches: Tensor, classes: Tensor) -> Tensor:
        """``(B, N, C)`` patches and ``(B, K, C)`` classes to ``(B, N, K)`` cosines."""
        dtype = compute_dtype(patches.dtype)
        with no_autocast(patches):
            patches, classes = (F.normalize(x.to(dtype), dim=-1) for x in (patches, classes))
            return patches @ classes.mT


class ScaleShift(nn.Module):
    """One weight and one bias, in the place of a norm over a single class, which would erase it."""

    def __init__(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``weight * x + bias``."""
        return self.weight * x + self.bias


def _class_norm(num_classes: int, **factory_kwargs: Any) -> nn.Module:
    return ScaleShift(**factory_kwargs) if num_classes == 1 else nn.LayerNorm(num_classes, **factory_kwargs)
