"""Coding rates per layer (the paper's Fig. 5), and what one layer reduces them by (Fig. 6)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cbsa_torch import ops
from cbsa_torch._core.checks import check_positive
from cbsa_torch._core.precision import no_autocast
from cbsa_torch.interpret._batches import captured_batches
from cbsa_torch.interpret._statistics import rank_correlation
from cbsa_torch.interpret.capture import LayerRecord
from cbsa_torch.nn import CBSA
from cbsa_torch.ops.cbsa.api import DEFAULT_EPS


class LayerRates(NamedTuple):
    """The compression term R^c(Z | U) at every attention layer, in nats; lists run over layers."""

    layers: list[str]
    rate: list[float]
    """Mean over images."""
    rate_std: list[float]
    """Standard deviation over images."""
    normalized: list[float]
    """Mean with every projected token scaled to unit norm."""
    normalized_std: list[float]
    images: int
    per_head: list[list[float]]
    """``[layer][head]``: mean over images of R(U_k^T Z); a layer's heads add up to ``rate``."""
    per_head_normalized: list[list[float]]


class ReducedRates(NamedTuple):
    """What each head of each CBSA layer reduces the coding rate by, in nats.

    Lists of lists are ``[layer][head]``, means over images; a negative reduction is an increase.
    """

    layers: list[str]
    tokens: list[list[float]]
    """Of the tokens by one step of Eq. 6 with kappa = 1: R(W) - R(W - A C), W = U_k^T Z."""
    tokens_learned: list[list[float]]
    """Of the tokens by the step that the layer takes: R(W) - R(W + kappa A C), kappa learned."""
    representatives: list[list[float]]
    """Of the representatives by their contraction: R(U_k^T Q) - R(C)."""
    step_tokens: list[list[float]]
    """kappa."""
    gap: list[list[float]]
    """|R(U_k^T Q) - R(U_k^T Z)|: the tau of Eq. 4 that would just do."""
    correlation: float
    """Spearman's rank correlation of ``tokens`` and ``representatives`` over layers and heads; NaN where it is
    undefined."""
    correlation_learned: float
    """The same of ``tokens_learned`` and ``representatives``."""
    images: int
    output: list[list[float]]
    """By CBSA's output in place of the tokens, no residual: R(W) - R(A C), kappa = 1."""
    correlation_output: float
    """The same of ``output`` and ``representatives``."""


class Rates(NamedTuple):
    """Both measurements of one pass."""

    coding: LayerRates
    reduced: ReducedRates | None
    """None for a model without CBSA layers."""


def coding_rates(model: nn.Module, batches: Iterable[Tensor], *, eps: float = DEFAULT_EPS) -> LayerRates:
    """Measure how compressed the tokens are in each layer's subspaces (Fig. 5).

    At layer l the tokens are those its attention receives (after the layer's normalisation), projected by
    that layer's own bases: R^c(Z^l | U^l) = sum over heads of R(U_k^T Z), Eq. 2. With separate projections
    the queries stand for U_k^T Z. For single images, apply :func:`cbsa_torch.ops.coding_rate` to ``tokens``
    and ``token_mask`` of a record of :func:`cbsa_torch.interpret.capture`.

    Args:
        model: a model with attention layers that ``capture`` records; it is run as it is (call ``.eval()``
            first).
        batches: inputs of the model.
        eps: quantisation precision.

    Raises:
        TypeError: a batch is not a tensor. ValueError: no batch, a model without attention layers, ``eps``
            not positive.
    """
    return _measure(model, batches, eps, reduced=False).coding


def reduced_rates(model: nn.Module, batches: Iterable[Tensor], *, eps: float = DEFAULT_EPS) -> ReducedRates:
    """Measure what CBSA reduces the rates of tokens and of representatives by (Fig. 6).

    With W = U_k^T Z the tokens in a subspace, A the attention of Eq. 5, Q the extracted representatives and
    C their contraction (Eq. 7 or 8), tokens after the layer's step are

    - for ``tokens``: W - A C. This is Eq. 6, Z - kappa CBSA(Z), at kappa = 1, whatever kappa the layer learned.
    - for ``tokens_learned``: W + kappa A C with the layer's own ``step_tokens``, which is what
      x + CBSA(norm(x)) adds, as if it projected back by the tied orthonormal bases.
    - for ``output``: A C alone, without the residual. "After CBSA" in Fig. 6 can be read this way too, and the
      official code does not say; here tokens and representatives are treated alike, Q becoming C and W
      becoming A C.

    Mind the sign: Eq. 6 subtracts and the layer adds, so a negative kappa is a step in the direction of
    Eq. 6. With the exact contraction (7) that direction compresses. The softmax contraction (8) stands for
    the inverse only up to sign and scale, which kappa absorbs: C is there an average of representatives, and
    which sign compresses is for the measurement to say (``tokens_learned``), not for kappa alone.

    The contraction ``"none"`` has C = Q, so its representatives are reduced by zero.

    Args:
        model: a model with CBSA layers; it is run as it is (call ``.eval()`` first). Layers of other kinds
            are left out.
        batches: inputs of the model.
        eps: quantisation precision of the rates (not that of the exact contraction).

    Raises:
        TypeError: a batch is not a tensor. ValueError: no batch, a model without CBSA layers, ``eps`` not
            positive.
    """
    if not any(isinstance(module, CBSA) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has no CBSA layer, whose steps the reduced rates are of")
    measured = _measure(model, batches, eps, coding=False).reduced
    if measured is None:
        raise ValueError(f"no CBSA layer of {type(model).__name__} took part in its forward pass")
    return measured


def measure_rates(model: nn.Module, batches: Iterable[Tensor], *, eps: float = DEFAULT_EPS) -> Rates:
    """:func:`coding_rates` and, if there are CBSA layers, :func:`reduced_rates`, in one pass over ``batches``.

    It takes less time than the two one after the other, and ``batches`` may be an iterator. Arguments and
    errors are those of :func:`coding_rates`.
    """
    return _measure(model, batches, eps)


_REDUCED = ("tokens", "tokens_learned", "output", "representatives", "gap")


def _measure(
    model: nn.Module, batches: Iterable[Tensor], eps: float, *, coding: bool = True, reduced: bool = True
) -> Rates:
    check_positive("eps", eps)
    seen: dict[str, dict[str, list[Tensor]]] = {}  # layer -> quantity -> (B, H) of every batch
    steps: dict[str, list[float]] = {}
    for records in captured_batches(model, batches):
        for name, record in records.items():
            with torch.no_grad(), no_autocast(record.tokens):
                measured = _rates_of(record, eps, coding, reduced)
            for quantity, values in measured.items():
                seen.setdefault(name, {}).setdefault(quantity, []).append(values.double().cpu())
            if isinstance(record.layer, CBSA):
                steps[name] = record.layer.step_tokens.detach().double().tolist()
        records.clear()  # before the next batch makes its own
    joined = {name: {q: torch.cat(v) for q, v in quantities.items()} for name, quantities in seen.items()}
    return Rates(_layer_rates(joined, coding), _reduced_rates(joined, steps))


def _rates_of(record: LayerRecord, eps: float, coding: bool, reduced: bool) -> dict[str, Tensor]:
    """The quantities of one layer and batch, ``(B, H)`` each."""
    stages = record.stages if reduced else None
    if not coding and stages is None:
        return {}

    def rate(x: Tensor, mask: Tensor | None, normalize: bool = False) -> Tensor:
        return ops.coding_rate(x, eps=eps, normalize=normalize, token_mask=mask)

    before = rate(record.tokens, record.token_mask)
    measured = {"rate": before}
    if coding:
        measured["normalized"] = rate(record.tokens, record.token_mask, normalize=True)
    if stages is not None:
        step = stages.broadcast_attention @ stages.contracted  # (B, H, N, P): A C
        extracted = rate(stages.extracted, stages.representative_mask)
        measured["tokens"] = before - rate(stages.tokens - step, record.token_mask)
        measured["tokens_learned"] = before - rate(stages.tokens + stages.output, record.token_mask)
        measured["output"] = before - rate(step, record.token_mask)
        measured["representatives"] = extracted - rate(stages.contracted, stages.representative_mask)
        measured["gap"] = (extracted - before).abs()
    return measured


def _layer_rates(joined: dict[str, dict[str, Tensor]], coding: bool) -> LayerRates:
    layers = list(joined) if coding else []
    raw = [joined[name]["rate"].sum(1) for name in layers]
    normalized = [joined[name]["normalized"].sum(1) for name in layers]
    return LayerRates(
        layers=layers,
        rate=[r.mean().item() for r in raw],
        rate_std=[r.std(correction=0).item() for r in raw],
        normalized=[r.mean().item() for r in normalized],
        normalized_std=[r.std(correction=0).item() for r in normalized],
        images=len(raw[0]) if raw else 0,
        per_head=[joined[name]["rate"].mean(0).tolist() for name in layers],
        per_head_normalized=[joined[name]["normalized"].mean(0).tolist() for name in layers],
    )


def _reduced_rates(joined: dict[str, dict[str, Tensor]], steps: dict[str, list[float]]) -> ReducedRates | None:
    layers = [name for name, quantities in joined.items() if "tokens" in quantities]
    if not layers:
        return None
    mean = {q: [joined[name][q].mean(0).tolist() for name in layers] for q in _REDUCED}
    representatives = _flat(mean["representatives"])
    return ReducedRates(
        layers=layers,
        step_tokens=[steps[name] for name in layers],
        correlation=rank_correlation(_flat(mean["tokens"]), representatives),
        correlation_learned=rank_correlation(_flat(mean["tokens_learned"]), representatives),
        correlation_output=rank_correlation(_flat(mean["output"]), representatives),
        images=len(joined[layers[0]]["tokens"]),
        **mean,
    )


def _flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]
