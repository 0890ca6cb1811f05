"""Coding rates per layer, head and image (the paper's Fig. 5), and what a layer reduces them by (Fig. 6)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from cbsa_torch import ops
from cbsa_torch._core.checks import check_positive
from cbsa_torch._core.precision import no_autocast, solve_dtype
from cbsa_torch._core.types import DEFAULT_EPS
from cbsa_torch.interpret._batches import captured_batches
from cbsa_torch.interpret._statistics import rank_correlation
from cbsa_torch.interpret.capture import LayerRecord, attention_layers
from cbsa_torch.nn import CBSA
from cbsa_torch.ops.coding_rate import rate_of_gram
from cbsa_torch.ops.masking import real_tokens


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

    Lists of lists are ``[layer][head]``, means over images unless it says otherwise; a negative reduction is
    an increase.
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
    """|R(U_k^T Q) - R(U_k^T Z)|, which Eq. 4 bounds by tau."""
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
    tokens_added: list[list[float]]
    """Of the tokens by one step the other way, that of a layer with kappa = 1: R(W) - R(W + A C)."""
    correlation_added: float
    """The same of ``tokens_added`` and ``representatives``."""
    gap_max: list[list[float]]
    """The largest ``gap`` of any image: the largest number here is the tau of Eq. 4 that would just do."""


class ImageRates(NamedTuple):
    """What one layer measures on every image: ``(images, H)`` float64 tensors on the CPU, in nats.

    The names are those of :class:`ReducedRates`, whose numbers are means of these over images.
    """

    rate: Tensor
    """R(U_k^T Z); the sum over heads is the compression term R^c(Z | U) of the image (2)."""
    normalized: Tensor
    """The same with every projected token scaled to unit norm."""
    tokens: Tensor | None = None
    """R(W) - R(W - A C). None for layers that are not CBSA, and so are the following."""
    tokens_learned: Tensor | None = None
    """R(W) - R(W + kappa A C)."""
    representatives: Tensor | None = None
    """R(U_k^T Q) - R(C)."""
    gap: Tensor | None = None
    """|R(U_k^T Q) - R(U_k^T Z)|."""
    output: Tensor | None = None
    """R(W) - R(A C)."""
    tokens_added: Tensor | None = None
    """R(W) - R(W + A C)."""


class Rates(NamedTuple):
    """Both measurements of one pass."""

    coding: LayerRates
    reduced: ReducedRates | None
    """None for a model without CBSA layers."""


def coding_rates(model: nn.Module, batches: Iterable[Tensor], *, eps: float = DEFAULT_EPS) -> LayerRates:
    """Measure how compressed the tokens are in each layer's subspaces (Fig. 5).

    At layer l the tokens are those its attention receives (after the layer's normalisation), projected by
    that layer's own bases: R^c(Z^l | U^l) = sum over heads of R(U_k^T Z), Eq. 2. With separate projections
    the queries stand for U_k^T Z. For single images see :func:`image_rates`.

    Args:
        model: a model with attention layers that ``capture`` records; it is run as it is (call ``.eval()``
            first).
        batches: inputs of the model.
        eps: quantisation precision.

    Raises:
        TypeError: a batch is not a tensor. ValueError: no batch, a model without attention layers, ``eps``
            not positive.
    """
    return _layer_rates(_per_image(model, batches, eps, reduced=False))


def reduced_rates(model: nn.Module, batches: Iterable[Tensor], *, eps: float = DEFAULT_EPS) -> ReducedRates:
    """Measure what CBSA reduces the rates of tokens and of representatives by (Fig. 6).

    With W = U_k^T Z the tokens in a subspace, A the attention of Eq. 5, Q the extracted representatives and
    C their contraction (Eq. 7 or 8), tokens after the layer's step are

    - for ``tokens``: W - A C. This is Eq. 6, Z - kappa CBSA(Z), at kappa = 1, whatever kappa the layer learned.
    - for ``tokens_learned``: W + kappa A C with the layer's own ``step_tokens``, which is what
      x + CBSA(norm(x)) adds, as if it projected back by the tied orthonormal bases.
    - for ``tokens_added``: W + A C, what the layer would add at kappa = 1.
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
    measured = _reduced_rates(model, _per_image(model, batches, eps))
    if measured is None:
        raise ValueError(f"no CBSA layer of {type(model).__name__} took part in its forward pass")
    return measured


def measure_rates(model: nn.Module, batches: Iterable[Tensor], *, eps: float = DEFAULT_EPS) -> Rates:
    """:func:`coding_rates` and, if there are CBSA layers, :func:`reduced_rates`, in one pass over ``batches``.

    It takes less time than the two one after the other, and ``batches`` may be an iterator. Arguments and
    errors are those of :func:`coding_rates`.
    """
    per_image = _per_image(model, batches, eps)
    return Rates(_layer_rates(per_image), _reduced_rates(model, per_image))


def image_rates(
    model: nn.Module, batches: Iterable[Tensor], *, eps: float = DEFAULT_EPS
) -> dict[str, ImageRates]:
    """What :func:`measure_rates` takes the means of: every rate of every image, layer and head.

    Returns:
        Layer name to :class:`ImageRates`, in the order of evaluation, images in that of ``batches``. With one
        number of heads everywhere, ``torch.stack([r.rate for r in rates.values()], 1)`` is
        ``(images, layers, H)``.

    Arguments and errors are those of :func:`coding_rates`.
    """
    return _per_image(model, batches, eps)


def _per_image(
    model: nn.Module, batches: Iterable[Tensor], eps: float, *, reduced: bool = True
) -> dict[str, ImageRates]:
    check_positive("eps", eps)
    seen: dict[str, list[ImageRates]] = {}
    for records in captured_batches(model, batches):
        for name, record in records.items():
            with torch.no_grad(), no_autocast(record.tokens):
                seen.setdefault(name, []).append(_rates_of(record, eps, reduced))
        records.clear()  # before the next batch makes its own
    return {name: _joined(parts) for name, parts in seen.items()}


def _joined(parts: list[ImageRates]) -> ImageRates:
    """The batches one after the other."""
    quantities: Any = zip(*parts, strict=True)
    whole: list[Any] = [None if q[0] is None else torch.cat(q).double().cpu() for q in quantities]
    return ImageRates(*whole)


def _rates_of(record: LayerRecord, eps: float, reduced: bool) -> ImageRates:
    """Those of one layer and batch, ``(B, H)`` each."""

    def rate(x: Tensor, mask: Tensor | None = record.token_mask, normalize: bool = False) -> Tensor:
        return ops.coding_rate(x, eps=eps, normalize=normalize, token_mask=mask)

    wide = solve_dtype(record.tokens)  # differences are small beside rates
    w, stages = record.tokens.to(wide).contiguous(), record.stages  # strided heads multiply slowly
    if stages is None or not reduced:
        return ImageRates(rate(w), rate(w, normalize=True))
    real = stages.representative_mask
    extracted, contracted = (rate(x.to(wide), real) for x in (stages.extracted, stages.contracted))
    kappa = cast(Tensor, record.step_tokens).to(wide)[:, None, None]
    step = (stages.broadcast_attention @ stages.contracted).to(wide)  # (B, H, N, P): A C
    before, alone, subtracted, learned, added = _rates_along(
        w, step, (-1.0, kappa, 1.0), record.token_mask, eps
    )
    return ImageRates(
        rate=before,
        normalized=rate(w, normalize=True),
        tokens=before - subtracted,
        tokens_learned=before - learned,
        representatives=extracted - contracted,
        gap=(extracted - before).abs(),
        output=before - alone,
        tokens_added=before - added,
    )


def _rates_along(
    w: Tensor, step: Tensor, lengths: Sequence[Tensor | float], mask: Tensor | None, eps: float
) -> list[Tensor]:
    """R(W), R(S) and R(W + t S) for every t of ``lengths``.

    All from three products, (W + t S)^T (W + t S) = W^T W + t (W^T S + S^T W) + t^2 S^T S, on the smaller
    side; they are what takes time.
    """
    w, count = real_tokens(w, mask, w.dtype)
    step, _ = real_tokens(step, mask, w.dtype)
    n, q = w.shape[-2:]
    if n < q:
        w, step = w.mT, step.mT
    scale = q / (count * eps**2)
    both = w.mT @ step
    tokens, cross, steps = scale * (w.mT @ w), scale * (both + both.mT), scale * (step.mT @ step)
    after = (tokens + t * cross + t**2 * steps for t in lengths)
    return [rate_of_gram(gram) for gram in (tokens, steps, *after)]


def _layer_rates(per_image: dict[str, ImageRates]) -> LayerRates:
    layers = list(per_image.values())
    raw = [rates.rate.sum(1) for rates in layers]
    normalized = [rates.normalized.sum(1) for rates in layers]
    return LayerRates(
        layers=list(per_image),
        rate=[r.mean().item() for r in raw],
        rate_std=[r.std(correction=0).item() for r in raw],
        normalized=[r.mean().item() for r in normalized],
        normalized_std=[r.std(correction=0).item() for r in normalized],
        images=len(raw[0]) if raw else 0,
        per_head=[rates.rate.mean(0).tolist() for rates in layers],
        per_head_normalized=[rates.normalized.mean(0).tolist() for rates in layers],
    )


def _reduced_rates(model: nn.Module, per_image: dict[str, ImageRates]) -> ReducedRates | None:
    cbsa = {name: rates for name, rates in per_image.items() if rates.tokens is not None}
    if not cbsa:
        return None
    modules = attention_layers(model)

    def of(quantity: str) -> list[Tensor]:
        return [getattr(rates, quantity) for rates in cbsa.values()]

    reduced = ImageRates._fields[2:]  # not the rate itself and its normalised form
    mean = {quantity: [values.mean(0).tolist() for values in of(quantity)] for quantity in reduced}
    representatives = _flat(mean["representatives"])
    return ReducedRates(
        layers=list(cbsa),
        step_tokens=[cast(Tensor, modules[name].step_tokens).tolist() for name in cbsa],
        correlation=rank_correlation(_flat(mean["tokens"]), representatives),
        correlation_learned=rank_correlation(_flat(mean["tokens_learned"]), representatives),
        correlation_output=rank_correlation(_flat(mean["output"]), representatives),
        correlation_added=rank_correlation(_flat(mean["tokens_added"]), representatives),
        images=len(of("tokens")[0]),
        gap_max=[values.amax(0).tolist() for values in of("gap")],
        **mean,
    )


def _flat(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]
