"""Running a model over batches and handing on what its layers computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from cbsa_torch.interpret.capture import LayerRecord, capture


def check_batches(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield ``batches``.

    Raises:
        TypeError: a batch is not a tensor. ValueError: there is none, or none with an image.
    """
    images = 0
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise TypeError(f"batches must yield tensors, the model's inputs; got {type(batch).__name__}")
        if len(batch):
            images += len(batch)
            yield batch
    if not images:
        raise ValueError("batches must hold at least one batch with at least one image, got none")


def captured_batches(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[dict[str, LayerRecord]]:
    """Run ``model`` on every batch and yield its records; errors as :func:`check_batches`."""
    for batch in check_batches(batches):
        with torch.no_grad(), capture(model) as records:
            model(batch)
        yield records
