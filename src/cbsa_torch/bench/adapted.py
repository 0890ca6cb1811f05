"""Adapted ViTs beside their original: parameters, FLOPs, speed and memory at several sizes of the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from cbsa_torch.bench import measure
from cbsa_torch.models.adapt.vit import MixerName, adapt_vit
from cbsa_torch.models.counting import count_model

ORIGINAL = "original"


class Variant(NamedTuple):
    """A way to adapt."""

    mixer: MixerName
    layers: str | Sequence[int] = "all"
    options: Mapping[str, Any] = {}
    """Of :func:`cbsa_torch.models.adapt_vit`."""


class AdaptedRow(NamedTuple):
    """One variant at one size, for inference."""

    name: str
    image_size: int
    parameters: int
    flops: int
    """For one image, two per multiply-add."""
    images_per_second: float
    peak_mib: float
    """Memory at the worst moment of a batch, beyond parameters and images."""


def compare(
    base: str,
    base_args: Mapping[str, Any],
    variants: Mapping[str, Variant],
    *,
    image_sizes: Sequence[int],
    batches: Sequence[int],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    repetitions: int = 5,
    budget: float = 20.0,
    progress: Callable[[str], None] = lambda message: None,
) -> list[AdaptedRow]:
    """Count and time the original and every variant; weights are random, as cost does not depend on them.

    Args:
        base: a ViT of timm.
        base_args: what it is created with; the size of the image is replaced.
        variants: by name.
        image_sizes: sides of square images.
        batches: images per batch, for each size.
        device, dtype: of parameters and images.
        repetitions: calls that count, at most.
        budget: seconds for the calls of one variant.
        progress: is told what comes next.
    """
    rows = []
    for size, batch in zip(image_sizes, batches, strict=True):
        args = {**base_args, "img_size": size}
        progress(f"{size} x {size}")
        models = {name: _build(base, args, variant) for name, variant in with_original(variants).items()}
        functions: dict[str, partial[Any]] = {}
        for name, model in models.items():
            model.to(device=device, dtype=dtype).eval()
            channels = int(getattr(model, "in_chans", 3))
            images = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
            functions[name] = partial(measure.forward, model, images)
        times = measure.interleaved(functions, device, repetitions=repetitions, budget=budget)
        for name, seconds in measure.medians(times).items():
            with torch.device("meta"):  # softmax attention of a large image would not fit into memory
                counts = count_model(_build(base, args, with_original(variants)[name]), (channels, size, size))
            peak = measure.memory(functions[name], device).peak / 2**20
            total = counts.total
            rows.append(AdaptedRow(name, size, total.parameters, total.counts.flops, batch / seconds, peak))
    return rows


def with_original(variants: Mapping[str, Variant]) -> dict[str, Variant | None]:
    """The variants behind the original, which is None."""
    return {ORIGINAL: None, **variants}


def _build(base: str, args: Mapping[str, Any], variant: Variant | None) -> nn.Module:
    model: nn.Module = timm.create_model(base, **args)
    if variant is None:
        return model
    layers = variant.layers
    return adapt_vit(model, variant.mixer, layers=layers, inplace=True, **variant.options).model
