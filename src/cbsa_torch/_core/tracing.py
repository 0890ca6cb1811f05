"""Sizes that a traced or exported graph keeps: what is computed from them is that of the example."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cbsa_torch._core.fx import fx_leaf


def is_recorded() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` records a program, which is to run without our code."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or torch.compiler.is_exporting()


def refuse_dynamic(name: str, sizes: Iterable[Any]) -> None:
    """Raise ``ValueError`` where an export declares one of ``sizes``, called ``name``, dynamic.

    The graph would hold the pooled grid and the resampled positions of the example, and formats without guards
    (ONNX) would run it at other sizes: it would be wrong in silence.
    """
    if not torch.compiler.is_exporting():
        return
    # an export has loaded it; by itself it takes a second
    from torch.fx.experimental.symbolic_shapes import has_static_value

    if not all(has_static_value(size) for size in sizes):
        raise ValueError(
            f"{name} must not be dynamic when a model is exported: the grid of representatives and the "
            "positions would be those of the example at any size. Export once for each image size; the batch "
            "may be dynamic"
        )


def pin_size(name: str, x: Tensor, axes: tuple[int, ...] = (2, 3)) -> Tensor:
    """The tensor ``x``, called ``name``, whose sizes along ``axes`` an export or a trace keeps.

    An export that declares them dynamic raises; a graph of ``torch.jit.trace`` raises when it is run at others.
    """
    refuse_dynamic(name, (x.shape[axis] for axis in axes))
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            sizes = [int(x.shape[axis]) for axis in axes]
        for axis, size in zip(axes, sizes, strict=True):
            (x,) = x.split_with_sizes([size], axis)  # raises unless the sizes add up
    return x


@fx_leaf
def pin_image_size(images: Tensor) -> Tensor:
    """:func:`pin_size` of images ``(B, C, height, width)``; TorchScript, which decides by size, keeps none."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        return pin_size("height and width of images", images)
    return images
