"""An encoder of images and a decoder of masks, for images of any size."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch._core.checks import check_bool, check_floating
from cbsa_torch._core.modules import no_weight_decay_inside
from cbsa_torch._core.tracing import is_open, pin_size
from cbsa_torch.models.segmentation.decoder import MaskTransformerDecoder
from cbsa_torch.models.segmentation.features import channels, check_encoder, patch_features, strides


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

    Raises:
        TypeError: an encoder without features. ValueError: a decoder of other features.
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

    def forward_features(self, x: Tensor) -> Tensor:
        """Features ``(B, C, h, w)`` of images, padded to whole patches."""
        check_floating("images", x)
        if x.ndim != 4 or x.shape[1] != self.in_chans or 0 in x.shape:
            raise ValueError(
                f"images must have shape (B, {self.in_chans}, height, width), got {tuple(x.shape)}"
            )
        x = pin_size(x)
        height, width = self._padded(x)
        if is_open(height, width):
            # by a number that is 0 for the example, PyTorch's exporters may not pad at all
            x = F.pad(x, (0, 2 * self.strides[1], 0, self.strides[0]))[..., :height, :width]
        else:
            x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
        with torch.no_grad() if self.freeze_encoder else nullcontext():
            return patch_features(self.encoder, x)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits of the same height and width."""
        features = self.forward_features(x)
        return self.decoder(features, self._padded(x))[..., : x.shape[2], : x.shape[3]]

    def _padded(self, x: Tensor) -> tuple[int, int]:
        """The next sides that are multiples of the patch; of timm's ViTs two patches wide at least."""
        vertical, horizontal = self.strides
        # of positive numbers: ONNX rounds quotients of negative ones up
        rows, columns = (x.shape[2] + vertical - 1) // vertical, (x.shape[3] + horizontal - 1) // horizontal
        if getattr(self.encoder, "dynamic_img_size", False):
            # timm resamples positions in channels-last memory, where torch 2.14 gets a width of 1 wrong.
            columns = cast(int, torch.sym_max(columns, 2)) if is_open(columns) else max(columns, 2)
        return rows * vertical, columns * horizontal

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
