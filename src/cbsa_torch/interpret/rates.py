"""Coding rates per layer (the paper's Fig. 5)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cbsa_torch import ops
from cbsa_torch.interpret.capture import capture
from cbsa_torch.ops.cbsa.api import DEFAULT_EPS


class LayerRates(NamedTuple):
    """The compression term R^c(Z | U) at every CBSA layer, in nats; lists run over layers."""

    layers: list[str]
    rate: list[float]
    """Mean over images."""
    rate_std: list[float]
    """Standard deviation over images."""
    normalized: list[float]
    """Mean with every projected token scaled to unit norm."""
    normalized_std: list[float]
    images: int


@torch.no_grad()
def coding_rates(model: nn.Module, batches: Iterable[Tensor], *, eps: float = DEFAULT_EPS) -> LayerRates:
    """Measure how compressed the tokens are in each layer's subspaces.

    At layer l the tokens are those its CBSA receives (after the layer's normalisation), projected by that
    layer's own bases: R^c(Z^l | U^l) = sum over heads of R(U_k^T Z), Eq. 2.

    Args:
        model: a model with CBSA layers; it is run as it is (call ``.eval()`` first).
        batches: inputs of the model.
        eps: quantisation precision.

    Raises:
        TypeError: a batch is not a tensor. ValueError: no batch, or a model without CBSA layers.
    """
    plain: dict[str, list[Tensor]] = {}
    scaled: dict[str, list[Tensor]] = {}
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise TypeError(f"batches must yield tensors, the model's inputs; got {type(batch).__name__}")
        with capture(model) as records:
            model(batch)
        for name, record in records.items():
            tokens, mask = record.tokens, record.token_mask
            for rates, normalize in ((plain, False), (scaled, True)):
                rate = ops.compression_rate(tokens, eps=eps, normalize=normalize, token_mask=mask)
                rates.setdefault(name, []).append(rate.cpu())
    if not plain:
        raise ValueError("batches must hold at least one batch")
    raw = [torch.cat(values).double() for values in plain.values()]
    normalized = [torch.cat(values).double() for values in scaled.values()]
    return LayerRates(
        layers=list(plain),
        rate=[r.mean().item() for r in raw],
        rate_std=[r.std(correction=0).item() for r in raw],
        normalized=[r.mean().item() for r in normalized],
        normalized_std=[r.std(correction=0).item() for r in normalized],
        images=len(raw[0]),
    )
