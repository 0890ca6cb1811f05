"""Inference by windows: crops of one size, logits averaged where they overlap; and over scales and flips."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch._core.checks import check_bool, check_floating, check_positive, check_positive_int, check_sides
from cbsa_torch._core.modes import evaluating
from cbsa_torch._core.precision import compute_dtype

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Of Segmenter's multi-scale evaluation, which the paper follows."""
Size = int | tuple[int, int]


class Window(NamedTuple):
    """Where a crop lies."""

    image: int
    top: int
    left: int
    height: int
    width: int


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side: every ``stride`` pixels, the last one at the end of the side."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


@overload
def sliding_logits(
    model: nn.Module, images: Tensor, window: Size = ..., stride: Size | None = ..., batch_size: int = ...
) -> Tensor: ...


@overload
def sliding_logits(
    model: nn.Module,
    images: Sequence[Tensor],
    window: Size = ...,
    stride: Size | None = ...,
    batch_size: int = ...,
) -> list[Tensor]: ...


def sliding_logits(
    model: nn.Module,
    images: Tensor | Sequence[Tensor],
    window: Size = 512,
    stride: Size | None = None,
    batch_size: int = 8,
) -> Tensor | list[Tensor]:
    """Run ``model`` on windows of the images and average its logits where windows overlap.

    The windows of all images go through the model together, in batches of windows of one size. A side shorter
    than the window is taken whole. The model runs in eval mode without gradients, and is left as it was.

    Args:
        model: ``(B, C, height, width)`` images of any size to ``(B, K, height, width)`` logits, such as a
            :class:`Segmenter`.
        images: ``(B, C, height, width)``, or a sequence of ``(C, height, width)`` of different sizes. They may
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
    """
    window, stride = _window_and_stride(window, stride)
    check_positive_int("batch_size", batch_size)
    listed = _as_list(images)
    by_size: dict[tuple[int, int], list[Window]] = defaultdict(list)
    for i, image in enumerate(listed):
        for place in _windows(i, (image.shape[1], image.shape[2]), window, stride):
            by_size[place.height, place.width].append(place)
    sums: dict[int, Tensor] = {}
    with evaluating(model):
        for places in by_size.values():
            for start in range(0, len(places), batch_size):
                _add(model, listed, places[start : start + batch_size], sums)
    results = [sums[i].div_(_overlaps(image, window, stride)) for i, image in enumerate(listed)]
    return torch.stack(results) if isinstance(images, Tensor) else results


@overload
def multi_scale_logits(
    model: nn.Module,
    images: Tensor,
    window: Size = ...,
    stride: Size | None = ...,
    batch_size: int = ...,
    *,
    scales: Sequence[float] = ...,
    flip: bool = ...,
) -> Tensor: ...


@overload
def multi_scale_logits(
    model: nn.Module,
    images: Sequence[Tensor],
    window: Size = ...,
    stride: Size | None = ...,
    batch_size: int = ...,
    *,
    scales: Sequence[float] = ...,
    flip: bool = ...,
) -> list[Tensor]: ...


def multi_scale_logits(
    model: nn.Module,
    images: Tensor | Sequence[Tensor],
    window: Size = 512,
    stride: Size | None = None,
    batch_size: int = 8,
    *,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
) -> Tensor | list[Tensor]:
    """:func:`sliding_logits` of the images at several scales, and mirrored, averaged as probabilities.

    Args:
        model, images, window, stride, batch_size: as in :func:`sliding_logits`; the window does not scale.
        scales: factors of the images' sides; bilinear, with antialiasing.
        flip: also take every scale mirrored left to right.

    Returns:
        The logarithm of the mean probability of every class, hence logits whose softmax is that mean, in the
        shape of :func:`sliding_logits`. Of one class: the logit of the mean of the sigmoids.
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
        resized = [_resize(image, _scaled(image, scale)) for image in listed]
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
    tiny = torch.finfo(chances.dtype).tiny
    if len(chances) == 1:
        return torch.logit(chances, eps=torch.finfo(chances.dtype).eps)
    return chances.clamp(min=tiny).log()


def _scaled(image: Tensor, scale: float) -> tuple[int, int]:
    return max(round(image.shape[1] * scale), 1), max(round(image.shape[2] * scale), 1)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if size == tuple(image.shape[1:]):
        return image
    exact = image[None].to(compute_dtype(image.dtype))  # half precision has no such kernel on the CPU
    return F.interpolate(exact, size, mode="bilinear", antialias=True)[0].to(image.dtype)


def _windows(
    image: int, size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> list[Window]:
    height, width = min(window[0], size[0]), min(window[1], size[1])
    return [
        Window(image, top, left, height, width)
        for top in window_starts(size[0], height, stride[0])
        for left in window_starts(size[1], width, stride[1])
    ]


def _add(model: nn.Module, images: list[Tensor], places: list[Window], sums: dict[int, Tensor]) -> None:
    """Run the model on some windows of one size and add the logits to their images'."""
    crops = [images[i][:, top : top + h, left : left + w] for i, top, left, h, w in places]
    like = next(model.parameters(), crops[0])
    logits: Tensor = model(torch.stack([crop.to(like.device) for crop in crops]))
    size = (places[0].height, places[0].width)
    if logits.ndim != 4 or tuple(logits.shape[2:]) != size or len(logits) != len(places):
        raise ValueError(
            f"model must return (B, K, height, width) logits of its images, got {tuple(logits.shape)} "
            f"for {len(places)} images of {size[0]} x {size[1]}"
        )
    for (i, top, left, h, w), found in zip(places, logits, strict=True):
        if i not in sums:
            dtype = compute_dtype(found.dtype)
            shape = (len(found), *images[i].shape[1:])
            sums[i] = torch.zeros(shape, device=images[i].device, dtype=dtype)
        sums[i][:, top : top + h, left : left + w] += found.to(sums[i].device, sums[i].dtype)


def _overlaps(image: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """How many windows cover each pixel, ``(height, width)``: rows times columns."""
    lines = []
    for length, w, s in zip(image.shape[1:], window, stride, strict=True):
        line = torch.zeros(length, device=image.device)
        for start in window_starts(length, w, s):
            line[start : start + w] += 1
        lines.append(line)
    return torch.outer(*lines)


def _as_list(images: Tensor | Sequence[Tensor]) -> list[Tensor]:
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


def _window_and_stride(window: Size, stride: Size | None) -> tuple[tuple[int, int], tuple[int, int]]:
    sides = check_sides("window", window)
    steps = sides if stride is None else check_sides("stride", stride)
    if steps[0] > sides[0] or steps[1] > sides[1]:
        raise ValueError(f"stride must be at most the window {sides}, or pixels are left out; got {steps}")
    return sides, steps
