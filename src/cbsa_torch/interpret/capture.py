"""Capture: what every CBSA layer of a model computes, as typed records, without touching the model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cbsa_torch._core.checks import nearest
from cbsa_torch._core.types import CBSAStages, GridSize
from cbsa_torch.nn import CBSA


class LayerRecord(NamedTuple):
    """One layer's evaluation on one batch."""

    name: str
    """The layer's name in the model, e.g. ``blocks.3.attn``."""
    stages: CBSAStages
    """Every intermediate, detached."""
    grid_size: GridSize | None
    """None if the layer's representatives need no grid and it was given none."""
    num_prefix_tokens: int
    token_mask: Tensor | None
    """``(B, N)`` bool, True = a real token; None if all are."""


@contextmanager
def capture(model: nn.Module, layers: Sequence[str] | None = None) -> Iterator[dict[str, LayerRecord]]:
    """Record the CBSA layers of ``model`` during forward passes inside the context.

    Args:
        model: any module tree with :class:`cbsa_torch.CBSA` layers.
        layers: names of the layers to record. Default: all.

    Yields:
        A dictionary that each forward pass fills, in the order of evaluation: layer name to
        :class:`LayerRecord`. Records are recomputed eagerly from the layer's input, whatever
        implementation the layer runs; a compiled model runs uncompiled meanwhile. A layer that is called
        more than once keeps its last call.

    Raises:
        ValueError: no such layer, or a model without any. TypeError: ``layers`` is a string.
    """
    if isinstance(layers, str):
        raise TypeError(f"layers must be a sequence of names, got the string {layers!r}")
    found = {
        name.replace("_orig_mod.", ""): module  # torch.compile's, of the model or of a part
        for name, module in model.named_modules()
        if isinstance(module, CBSA)
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no CBSA layer to capture")
    for name in layers or ():
        if name not in found:
            raise ValueError(
                f"layers: no CBSA layer {name!r}{nearest(name, found)}; there are {', '.join(found)}"
            )
    records: dict[str, LayerRecord] = {}
    handles = []

    def record(name: str) -> Any:
        @torch.no_grad()
        def hook(module: CBSA, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            called = module.named_arguments(*args, **kwargs)
            x, masks = called["x"], (called["token_mask"], called["attn_mask"])
            stages = module.stages(x, called["grid_size"], *masks)
            grid, prefix = module.token_grid(x, called["grid_size"]) or (None, module.num_prefix_tokens or 0)
            mask = module.token_mask(x, *masks)
            records[name] = LayerRecord(name, stages, grid, prefix, mask)

        return hook

    try:
        for name, module in found.items():
            if layers is None or name in layers:
                handles.append(module.register_forward_hook(record(name), with_kwargs=True))
        # Compiled code does not see hooks that are new.
        compiled = "torch._dynamo" in sys.modules
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield records
    finally:
        for handle in handles:
            handle.remove()
