"""An encoder of images and a decoder of masks, for images of any size."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch._core.checks import check_bool, check_floating
from cbsa_torch._core.modules import no_weight_decay_inside
from cbsa_torch._core.tracing import is_open, pin_image_size
from cbsa_torch.models.segmentation.decoder import MaskTransformerDecoder
from cbsa_torch.models.segmentation.features import channels, check_encoder, patch_features, strides
from cbsa_torch.nn.scripted import not_scriptable


class Segmenter(nn.Module):
    """Semantic segmentation: patch features of an encoder, masks of a decoder, upsampled to the image.

    Images whose sides are no multiples of the patch are padded at the bottom and on the right with zeros (the
    mean colour, once they are normalised), and the masks are cropped again. A ViT of timm with a dynamic image
    size is given two columns of patches at least.

    Args:
        encoder: any model of timm that offers ``forward_intermediates`` or ``forward_features``: ViT, DeiT,
            DINOv2 with register tokens, our own families, and convolutional networks. Class and register
            tokens are dropped. Position embeddings are resampled at run time where the encoder can: build
            timm's with ``dynamic_img_size=True``, as :func:`segmenter` does.
        decoder: of features with the encoder's number of channels.
        freeze_encoder: keep the encoder as it is: no gradients, always in eval mode.

    Attributes:
        num_classes: of the decoder. strides: pixels per patch, vertically and horizontally.

    Shape:
        ``(B, in_chans, height, width)`` -> ``(B, num_classes, height, width)`` logits.
        A list of images ``(in_chans, height, width)`` of any sizes -> a list of logits ``(num_classes, height,
        width)``: each gets what it would get alone. The decoder, and our own families as encoders, take them
        as one packed batch without padding; other encoders see those of one size together.

    Raises:
        TypeError: an encoder without features. ValueError: a decoder of other features.

    Examples:
        >>> import timm
        >>> from cbsa_torch.models import MaskTransformerDecoder, Segmenter
        >>> encoder = timm.create_model("cbt_nano_patch4_32")
        >>> model = Segmenter(encoder, MaskTransformerDecoder(num_classes=5, dim=128), freeze_encoder=True)
        >>> model.strides, model(torch.randn(1, 3, 32, 32)).shape
        ((4, 4), torch.Size([1, 5, 32, 32]))
    """

    def __init__(
        self, encoder: nn.Module, decoder: MaskTransformerDecoder, *, freeze_encoder: bool = False
    ) -> None:
        super().__init__()
        check_encoder(encoder)
        check_bool("freeze_encoder", freeze_encoder)
        if decoder.encoder_dim != channels(encoder):
            raise ValueError(
                f"decoder must take the encoder's {channels(encoder)} channels, got one with "
                f"encoder_dim={decoder.encoder_dim}"
            )
        self.encoder = encoder
        self.decoder = decoder
        self.freeze_encoder = freeze_encoder
        self.strides = strides(encoder)
        self.num_features = channels(encoder)
        self.in_chans: int = getattr(encoder, "in_chans", 3)
        if freeze_encoder:
            encoder.requires_grad_(False)
            encoder.eval()

    @property
    def num_classes(self) -> int:
        """Classes of the decoder."""
        return self.decoder.num_classes

    def train(self, mode: bool = True) -> Segmenter:
        """Set the mode of all but a frozen encoder."""
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def forward_features(self, x: Any) -> Any:
        """Features ``(B, C, h, w)`` of images, padded to whole patches; of a list of images a list."""
        if isinstance(x, (list, tuple)):
            for image in x:
                self._check("each of a list of images", image, 3, f"({self.in_chans}, height, width)")
            padded: Any = [self._pad(image) for image in x]
        else:
            self._check("images", x, 4, f"(B, {self.in_chans}, height, width)")
            padded = self._pad(pin_image_size(x))
        with torch.no_grad() if self.freeze_encoder else nullcontext():
            return patch_features(self.encoder, padded)

    def forward(self, x: Any) -> Any:
        """Images to logits of the same height and width; a list of images of any sizes to a list."""
        features = self.forward_features(x)
        if isinstance(x, (list, tuple)):
            masks = self.decoder(features, [self._padded(image) for image in x])
            return [mask[..., : image.shape[1], : image.shape[2]] for mask, image in zip(masks, x, strict=True)]
        return _cropped(self.decoder(features, self._padded(x)), (x.shape[2], x.shape[3]))

    def _check(self, name: str, images: Tensor, axes: int, shape: str) -> None:
        check_floating(name, images)
        if images.ndim != axes or images.shape[-3] != self.in_chans or 0 in images.shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(images.shape)}")

    def _pad(self, x: Tensor) -> Tensor:
        height, width = self._padded(x)
        if is_open(height, width):
            # by a number that is 0 for the example, PyTorch's exporters may not pad at all
            return F.pad(x, (0, 2 * self.strides[1], 0, self.strides[0]))[..., :height, :width]
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))

    def _padded(self, x: Tensor) -> tuple[int, int]:
        """The next sides that are multiples of the patch; of timm's ViTs two patches wide at least."""
        vertical, horizontal = self.strides
        # of positive numbers: ONNX rounds quotients of negative ones up
        rows = (x.shape[-2] + vertical - 1) // vertical
        columns = (x.shape[-1] + horizontal - 1) // horizontal
        if getattr(self.encoder, "dynamic_img_size", False):
            # timm resamples positions as torch 2.14 does, which gets a width of 1 wrong on the CPU.
            columns = cast(int, torch.sym_max(columns, 2)) if is_open(columns) else max(columns, 2)
        return rows * vertical, columns * horizontal

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse TorchScript: ``TypeError``."""
        raise not_scriptable(self, "its encoder returns objects of several kinds")

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that should not decay: what encoder and decoder say."""
        return no_weight_decay_inside(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's layers in the backward pass, where it can."""
        set_encoder: Any = getattr(self.encoder, "set_grad_checkpointing", None)
        if set_encoder is not None:
            set_encoder(enable)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Resample the encoder's position embedding for images of another size, for good, where it can."""
        set_encoder: Any = getattr(self.encoder, "set_input_size", None)
        if set_encoder is not None:
            set_encoder(img_size=img_size)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Start with other classes; see :meth:`MaskTransformerDecoder.reset_classes`."""
        if global_pool:
            raise ValueError(f"global_pool must be empty: masks are not pooled; got {global_pool!r}")
        self.decoder.reset_classes(num_classes)


def _cropped(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """The upper left part of ``(B, K, h, w)``."""
    if is_open(*size) and not torch.onnx.is_in_onnx_export():
        # a view would leave a guard in the program: it is contiguous where there is nothing to crop
        for axis, side in enumerate(size, 2):
            masks = masks.index_select(axis, torch.arange(side, device=masks.device))
        return masks
    return masks[..., : size[0], : size[1]]
