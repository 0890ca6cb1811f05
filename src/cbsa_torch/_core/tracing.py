"""Sizes of traced and exported graphs: those that stay open, and those that are the example's."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from cbsa_torch._core.fx import fx_leaf


def is_recorded() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` records a program, which is to run without our code."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tracing or torch.compiler.is_exporting()


def is_open(*sizes: Any) -> bool:
    """Whether an export leaves one of ``sizes`` open (dynamic): it is then an expression, not a number.

    Not with ``torch.export(strict=True)`` and ``torch.compile``: there grids are numbers, and each has a graph.
    """
    if not torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling():
        return False
    # an export has loaded it; by itself it takes a second
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not all(has_static_value(size) for size in sizes)


def pin_size(x: Tensor, axes: tuple[int, ...] = (2, 3)) -> Tensor:
    """The tensor ``x``; in a graph of ``torch.jit.trace`` it keeps its sizes along ``axes``.

    What layers make of a grid is that of the example there, so the graph raises when it is run at other sizes.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            sizes = [int(x.shape[axis]) for axis in axes]
        for axis, size in zip(axes, sizes, strict=True):
            (x,) = x.split_with_sizes([size], axis)  # raises unless the sizes add up
    return x


def pin_sides(x: Tensor, sides: Any) -> Tensor:
    """The tensor ``x``; a graph of ``torch.jit.trace`` raises when numbers in ``sides`` are not the example's.

    These are sizes of tensors that the graph reads: of tokens ``x`` in a row, it would not see another aspect.
    """
    if torch.jit.is_tracing() and isinstance(sides, (tuple, list)):  # type: ignore[attr-defined]
        for side in sides:
            if isinstance(side, Tensor):
                pinned = pin_size(x.new_zeros((side, 0)), (0,))  # type: ignore[arg-type]
                x = x + pinned.sum()  # of nothing: for the graph to keep it
    return x


@fx_leaf
def pin_image_size(images: Tensor) -> Tensor:
    """:func:`pin_size` of images ``(B, C, height, width)``; TorchScript, which decides by size, keeps none."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        return pin_size(images)
    return images
