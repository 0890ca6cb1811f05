"""Inference by windows: crops of one size, logits averaged where they overlap; and over scales and flips."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch._core.checks import check_bool, check_floating, check_positive, check_positive_int, check_sides
from cbsa_torch._core.modes import evaluating
from cbsa_torch._core.precision import compute_dtype
from cbsa_torch.models.resize import resize

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Factors of Segmenter's multi-scale evaluation, which the paper follows."""
Size = int | tuple[int, int]
Images = TypeVar("Images", Tensor, list[Tensor])


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side: every ``stride`` pixels, the last one at the end of the side."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def sliding_logits(
    model: nn.Module,
    images: Images,
    window: Size = 512,
    stride: Size | None = None,
    batch_size: int = 8,
) -> Images:
    """Run ``model`` on windows of the images and average its logits where windows overlap.

    The windows of all images go through the model together, in batches of windows of one size. A side shorter
    than the window is taken whole. The model runs in eval mode without gradients, and is left as it was.

    Args:
        model: ``(B, C, height, width)`` images of any size to ``(B, K, height, width)`` logits, such as a
            :class:`Segmenter`.
        images: ``(B, C, height, width)``, or a list of ``(C, height, width)`` of different sizes. They may
            be on another device than the model: windows are moved batch by batch.
        window: side or (height, width) in pixels.
        stride: from one window to the next, at most the window. Default: the window, as Segmenter evaluates
            ADE20K; only the last windows of a side then overlap.
        batch_size: windows at a time.

    Returns:
        Logits of every pixel on the images' device, in float32 at least: ``(B, K, height, width)``, or a list
        of ``(K, height, width)``.

    Raises:
        ValueError: sizes below 1, a stride above the window, images or logits of another shape.
        TypeError: images that are not floating-point tensors.

    Examples:
        >>> from cbsa_torch.models import segmenter, sliding_logits
        >>> model = segmenter(encoder="cbt_nano_patch4_32", encoder_args={"depth": 2}, num_classes=5)
        >>> sliding_logits(model, torch.randn(1, 3, 80, 48), window=32, stride=24).shape
        torch.Size([1, 5, 80, 48])
    """
    sides = check_sides("window", window)
    steps = sides if stride is None else check_sides("stride", stride)
    if steps[0] > sides[0] or steps[1] > sides[1]:
        raise ValueError(f"stride must be at most the window {sides}, or pixels are left out; got {steps}")
    check_positive_int("batch_size", batch_size)
    listed = _as_list(images)
    by_size: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for i, image in enumerate(listed):
        size = min(sides[0], image.shape[1]), min(sides[1], image.shape[2])
        tops, lefts = (window_starts(*along) for along in zip(image.shape[1:], size, steps, strict=True))
        by_size[size] += [(i, top, left) for top in tops for left in lefts]
    sums: dict[int, Tensor] = {}
    counts = [torch.zeros(image.shape[1:], device=image.device) for image in listed]
    with evaluating(model):
        for (h, w), places in by_size.items():
            for start in range(0, len(places), batch_size):
                batch = places[start : start + batch_size]
                crops = [listed[i][:, top : top + h, left : left + w] for i, top, left in batch]
                for (i, top, left), found in zip(batch, _run(model, crops), strict=True):
                    if i not in sums:
                        sums[i] = counts[i].new_zeros(
                            len(found), *counts[i].shape, dtype=compute_dtype(found.dtype)
                        )
                    sums[i][:, top : top + h, left : left + w] += found.to(sums[i].device, sums[i].dtype)
                    counts[i][top : top + h, left : left + w] += 1
    results = [sums[i].div_(count) for i, count in enumerate(counts)]
    return torch.stack(results) if isinstance(images, Tensor) else results


def multi_scale_logits(
    model: nn.Module,
    images: Images,
    window: Size = 512,
    stride: Size | None = None,
    batch_size: int = 8,
    *,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
) -> Images:
    """:func:`sliding_logits` of the images at several scales, and mirrored, averaged as probabilities.

    Args:
        model, images, window, stride, batch_size: as in :func:`sliding_logits`; the window does not scale.
        scales: factors of the images' sides; bilinear, with antialiasing.
        flip: also take every scale mirrored left to right.

    Returns:
        The logarithm of the mean probability of every class, hence logits whose softmax is that mean, in the
        shape of :func:`sliding_logits`. Of one class: the logit of the mean of the sigmoids.

    Raises:
        ValueError, TypeError: as :func:`sliding_logits`, and scales that are not numbers above 0.

    Examples:
        >>> from cbsa_torch.models import multi_scale_logits, segmenter
        >>> model = segmenter(encoder="cbt_nano_patch4_32", encoder_args={"depth": 2}, num_classes=5)
        >>> multi_scale_logits(model, torch.randn(1, 3, 48, 32), window=32, scales=(0.75, 1.0)).shape
        torch.Size([1, 5, 48, 32])
    """
    if not isinstance(scales, Sequence) or not scales:
        raise ValueError(f"scales must be a sequence of numbers above 0, got {scales!r}")
    for scale in scales:
        check_positive("scales", scale)
    check_bool("flip", flip)
    listed = _as_list(images)
    total: list[Tensor | None] = [None] * len(listed)
    views = [(scale, mirrored) for scale in scales for mirrored in ((False, True) if flip else (False,))]
    for scale, mirrored in views:
        resized = [_rescaled(image, scale) for image in listed]
        if mirrored:
            resized = [image.flip(-1) for image in resized]
        for i, logits in enumerate(sliding_logits(model, resized, window, stride, batch_size)):
            upright = logits.flip(-1) if mirrored else logits
            upright = F.interpolate(upright[None], listed[i].shape[1:], mode="bilinear")[0]
            chances = upright.sigmoid() if len(upright) == 1 else upright.softmax(0)
            so_far = total[i]
            total[i] = chances if so_far is None else so_far.add_(chances)
    results = [_as_logits(summed / len(views)) for summed in total if summed is not None]
    return torch.stack(results) if isinstance(images, Tensor) else results


def _as_logits(chances: Tensor) -> Tensor:
    limits = torch.finfo(chances.dtype)
    return torch.logit(chances, eps=limits.eps) if len(chances) == 1 else chances.clamp(min=limits.tiny).log()


def _rescaled(image: Tensor, scale: float) -> Tensor:
    size = max(round(image.shape[1] * scale), 1), max(round(image.shape[2] * scale), 1)
    return image if size == image.shape[1:] else resize(image[None], size, "bilinear")[0]


def _run(model: nn.Module, crops: list[Tensor]) -> Tensor:
    """The logits of windows of one size."""
    like, (h, w) = next(model.parameters(), crops[0]), crops[0].shape[1:]
    logits: Tensor = model(torch.stack([crop.to(like.device) for crop in crops]))
    if logits.ndim != 4 or logits.shape[2:] != (h, w) or len(logits) != len(crops):
        raise ValueError(
            f"model must return (B, K, height, width) logits of its images, got {tuple(logits.shape)} "
            f"for {len(crops)} images of {h} x {w}"
        )
    return logits


def _as_list(images: Tensor | list[Tensor]) -> list[Tensor]:
    if isinstance(images, Tensor) and images.ndim != 4:
        raise ValueError(f"images must have shape (B, C, height, width), got {tuple(images.shape)}")
    listed = list(images)
    if not listed:
        raise ValueError("images must not be empty")
    for image in listed:
        check_floating("images", image)
        if image.ndim != 3 or 0 in image.shape:
            raise ValueError(f"each of images must have shape (C, height, width), got {tuple(image.shape)}")
        first = listed[0]
        if image.shape[0] != first.shape[0] or image.dtype != first.dtype:
            raise ValueError(
                f"images must have one number of channels and one dtype, got {first.shape[0]} of {first.dtype} "
                f"and {image.shape[0]} of {image.dtype}"
            )
    return listed
