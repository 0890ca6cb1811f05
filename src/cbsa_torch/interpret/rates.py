"""Coding rates per layer, head and image (the paper's Fig. 5), and what a layer reduces them by (Fig. 6)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cbsa_torch import ops
from cbsa_torch._core.checks import check_positive
from cbsa_torch._core.precision import no_autocast, solve_dtype
from cbsa_torch._core.types import DEFAULT_EPS
from cbsa_torch.interpret.capture import LayerRecord, captured_batches
from cbsa_torch.nn import CBSA
from cbsa_torch.ops.coding_rate import rate_of_gram
from cbsa_torch.ops.masking import real_tokens


class LayerRates(NamedTuple):
    """The compression term R^c(Z | U) at every attention layer, in nats; lists run over layers.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import coding_rates
        >>> model = timm.create_model("crate_pico_patch1_8", depth=1).eval()
        >>> rates = coding_rates(model, [torch.randn(4, 1, 8, 8)])
        >>> abs(sum(rates.per_head[0]) - rates.rate[0]) < 1e-3
        True
    """

    layers: list[str]
    rate: list[float]
    """Mean over images."""
    rate_std: list[float]
    """Standard deviation over images."""
    normalized: list[float]
    """Mean with every projected token scaled to unit norm."""
    normalized_std: list[float]
    """Its standard deviation."""
    images: int
    """How many were measured."""
    per_head: list[list[float]]
    """``[layer][head]``: mean over images of R(U_k^T Z); a layer's heads add up to ``rate``."""
    per_head_normalized: list[list[float]]
    """The same of ``normalized``."""


class ReducedRates(NamedTuple):
    """What each head of each CBSA layer reduces the coding rate by, in nats: :class:`ImageRates`, summarised.

    Lists of lists are ``[layer][head]``, means over images of the field of that name. Correlations are
    Spearman's rank correlation of a reduction of the tokens with that of the representatives, over layers and
    heads; NaN where it is undefined.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import reduced_rates
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> rates = reduced_rates(model, [torch.randn(4, 1, 8, 8)])
        >>> -1 <= rates.correlation <= 1
        True
    """

    layers: list[str]
    tokens: list[list[float]]
    tokens_learned: list[list[float]]
    """By the step that the layer takes."""
    representatives: list[list[float]]
    step_tokens: list[list[float]]
    """kappa, as learned; of certified steps the mean over images."""
    gap: list[list[float]]
    """Between the rates of representatives and tokens (Eq. 4)."""
    correlation: float
    """Rank correlation of ``tokens`` with ``representatives``."""
    correlation_learned: float
    """The same for ``tokens_learned``."""
    images: int
    output: list[list[float]]
    """By the output in place of the tokens."""
    correlation_output: float
    """The same for ``output``."""
    tokens_added: list[list[float]]
    """By a step the other way."""
    correlation_added: float
    """The same for ``tokens_added``."""
    gap_max: list[list[float]]
    """The largest ``gap`` of any image. The largest number here is the smallest tau for which Eq. 4 holds."""


class ImageRates(NamedTuple):
    """What one layer measures on every image: ``(images, H)`` float64 tensors on the CPU, in nats.

    W = U_k^T Z are the tokens in the subspace of head k, A is the attention of Eq. 5 (of a certified step all
    weights B of the tokens in the representatives), Q are the extracted representatives in the subspace and C
    their contraction (Eq. 7 or 8). A negative reduction is an increase.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import image_rates
        >>> model = timm.create_model("tost_pico_patch1_8", depth=1).eval()
        >>> rates = image_rates(model, [torch.randn(4, 1, 8, 8)])
        >>> rates["blocks.0.attn"].tokens is None  # of TSSA, no reduction is measured
        True
    """

    rate: Tensor
    """R(W); the sum over heads is the compression term R^c(Z | U) of the image (Eq. 2)."""
    normalized: Tensor
    """The same with every projected token scaled to unit norm."""
    tokens: Tensor | None = None
    """By one step of Eq. 6 with kappa = 1: R(W) - R(W - A C). None for layers other than CBSA, as all below."""
    tokens_learned: Tensor | None = None
    """By the step that the layer takes, with its learned kappa: R(W) - R(W + kappa A C)."""
    representatives: Tensor | None = None
    """By the contraction of the representatives: R(Q) - R(C)."""
    gap: Tensor | None = None
    """|R(Q) - R(W)|, which Eq. 4 bounds by tau."""
    output: Tensor | None = None
    """By CBSA's output with kappa = 1 in place of the tokens, no residual: R(W) - R(A C)."""
    tokens_added: Tensor | None = None
    """By one step the other way, that of a layer with kappa = 1: R(W) - R(W + A C)."""
    step: Tensor | None = None
    """kappa: as learned, or of the certified step, which has one for every image and is negative."""


class Rates(NamedTuple):
    """What :func:`coding_rates` and :func:`reduced_rates` measure, of one pass.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import measure_rates
        >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
        >>> measure_rates(vit, [torch.randn(2, 3, 32, 32)]).reduced is None  # no CBSA
        True
    """

    coding: LayerRates
    """Of all attention layers."""
    reduced: ReducedRates | None
    """None for a model without CBSA layers."""


def coding_rates(model: nn.Module, batches: Iterable[Tensor], *, eps: float = DEFAULT_EPS) -> LayerRates:
    """Measure how compressed the tokens are in each layer's subspaces (Fig. 5).

    At layer l the tokens are those that its attention receives (after normalisation), projected by that
    layer's own bases: R^c(Z^l | U^l) = sum over heads of R(U_k^T Z), Eq. 2. Of layers that project queries,
    keys and values separately, the queries are taken for U_k^T Z. For single images see :func:`image_rates`.

    Args:
        model: a model with attention layers that ``capture`` records; it is run as it is (call ``.eval()``
            first).
        batches: inputs of the model.
        eps: quantisation precision of the coding rate. Default: 0.1.

    Raises:
        TypeError: a batch is not a tensor. ValueError: no batch, a model without attention layers, ``eps``
            not positive.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import coding_rates
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> rates = coding_rates(model, [torch.randn(4, 1, 8, 8)])
        >>> rates.layers
        ['blocks.0.attn']
    """
    return _layer_rates(_per_image(model, batches, eps, reduced=False))


def reduced_rates(model: nn.Module, batches: Iterable[Tensor], *, eps: float = DEFAULT_EPS) -> ReducedRates:
    """Measure what CBSA reduces the rates of tokens and of representatives by (Fig. 6).

    In the terms of :class:`ImageRates`, the tokens after the layer's step are

    - W - A C for ``tokens``: Eq. 6, Z - kappa CBSA(Z), at kappa = 1, whatever kappa the layer learned.
    - W + kappa A C for ``tokens_learned``, with the layer's own ``step_tokens``: what x + CBSA(norm(x)) adds,
      as if the layer projected back by the tied orthonormal bases.
    - W + A C for ``tokens_added``: what the layer would add at kappa = 1.
    - A C for ``output``, without the residual. "After CBSA" in Fig. 6 can be read this way too, and the
      official code does not say; tokens and representatives are then treated alike, Q becoming C and W
      becoming A C.

    Mind the sign: Eq. 6 subtracts and the layer adds, so a negative kappa is a step in the direction of
    Eq. 6. With the exact contraction (Eq. 7) that direction compresses. The softmax contraction (Eq. 8) stands
    for the inverse only up to sign and scale, which kappa absorbs: there C is an average of representatives,
    and the sign of kappa does not tell whether the step compresses; ``tokens_learned`` does.

    The contraction ``"none"`` has C = Q, so its representatives are reduced by zero.

    Args:
        model: a model with CBSA layers; it is run as it is (call ``.eval()`` first). Layers of other kinds
            are left out.
        batches: inputs of the model.
        eps: quantisation precision of the rates (not that of the exact contraction).

    Raises:
        TypeError: a batch is not a tensor. ValueError: no batch, a model without CBSA layers, ``eps`` not
            positive.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import reduced_rates
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> rates = reduced_rates(model, [torch.randn(4, 1, 8, 8)])
        >>> len(rates.tokens), len(rates.tokens[0])
        (1, 4)
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

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import measure_rates
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> rates = measure_rates(model, [torch.randn(4, 1, 8, 8)])
        >>> rates.coding.images, len(rates.coding.rate), len(rates.reduced.tokens[0])
        (4, 1, 4)
    """
    per_image = _per_image(model, batches, eps)
    return Rates(_layer_rates(per_image), _reduced_rates(model, per_image))


def image_rates(
    model: nn.Module, batches: Iterable[Tensor], *, eps: float = DEFAULT_EPS
) -> dict[str, ImageRates]:
    """Measure the rates of every image, layer and head; :func:`measure_rates` gives their means over images.

    Returns:
        Layer name to :class:`ImageRates`, in the order of evaluation, images in that of ``batches``. With one
        number of heads everywhere, ``torch.stack([r.rate for r in rates.values()], 1)`` is
        ``(images, layers, H)``.

    Arguments and errors are those of :func:`coding_rates`.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import image_rates
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> rates = image_rates(model, [torch.randn(4, 1, 8, 8)])
        >>> rates["blocks.0.attn"].rate.shape
        torch.Size([4, 4])
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
    whole: dict[str, ImageRates] = {}
    for name, parts in seen.items():
        quantities: Any = zip(*parts, strict=True)
        joined: list[Any] = [None if q[0] is None else torch.cat(q).double().cpu() for q in quantities]
        whole[name] = ImageRates(*joined)
    return whole


def _rates_of(record: LayerRecord, eps: float, reduced: bool) -> ImageRates:
    """The rates of one layer and batch, ``(B, H)`` each."""

    def rate(x: Tensor, mask: Tensor | None = record.token_mask, normalize: bool = False) -> Tensor:
        return ops.coding_rate(x, eps=eps, normalize=normalize, token_mask=mask)

    wide = solve_dtype(record.tokens)  # differences are small beside rates
    w, stages = record.tokens.to(wide).contiguous(), record.stages  # strided heads multiply slowly
    if stages is None or not reduced:
        return ImageRates(rate(w), rate(w, normalize=True))
    real = stages.representative_mask
    extracted, contracted = (rate(x.to(wide), real) for x in (stages.extracted, stages.contracted))
    kappa = stages.step.to(wide)[..., None, None]
    step = (stages.broadcast_attention @ stages.contracted).to(wide)  # (B, H, N, P): A C
    lengths = (-1.0, kappa, 1.0)
    before, alone, subtracted, learned, added = _rates_along(w, step, lengths, record.token_mask, eps)
    return ImageRates(
        rate=before,
        normalized=rate(w, normalize=True),
        tokens=before - subtracted,
        tokens_learned=before - learned,
        representatives=extracted - contracted,
        gap=(extracted - before).abs(),
        output=before - alone,
        tokens_added=before - added,
        step=stages.step,
    )


def _rates_along(
    w: Tensor, step: Tensor, lengths: Sequence[Tensor | float], mask: Tensor | None, eps: float
) -> list[Tensor]:
    """R(W), R(S) and R(W + t S) for every t of ``lengths``.

    All from three products, which take most of the time: (W + t S)^T (W + t S) = W^T W + t (W^T S + S^T W) +
    t^2 S^T S, or the same of the transposes if that is smaller.
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
    layers = per_image.values()
    raw, normalized = [r.rate.sum(1) for r in layers], [r.normalized.sum(1) for r in layers]
    return LayerRates(
        layers=list(per_image),
        rate=[r.mean().item() for r in raw],
        rate_std=[r.std(correction=0).item() for r in raw],
        normalized=[r.mean().item() for r in normalized],
        normalized_std=[r.std(correction=0).item() for r in normalized],
        images=len(raw[0]) if raw else 0,
        per_head=[r.rate.mean(0).tolist() for r in layers],
        per_head_normalized=[r.normalized.mean(0).tolist() for r in layers],
    )


def _reduced_rates(model: nn.Module, per_image: dict[str, ImageRates]) -> ReducedRates | None:
    cbsa = {name: rates for name, rates in per_image.items() if rates.tokens is not None}
    if not cbsa:
        return None

    def of(quantity: str) -> list[Tensor]:
        return [getattr(rates, quantity) for rates in cbsa.values()]

    reduced = ImageRates._fields[2:-1]  # not the rate itself and its normalised form, nor the step
    mean = {quantity: [values.mean(0).tolist() for values in of(quantity)] for quantity in reduced}

    def correlation(quantity: str) -> float:
        flat = [list(itertools.chain(*mean[of])) for of in (quantity, "representatives")]
        return rank_correlation(*flat)

    return ReducedRates(
        layers=list(cbsa),
        step_tokens=[values.mean(0).tolist() for values in of("step")],
        correlation=correlation("tokens"),
        correlation_learned=correlation("tokens_learned"),
        correlation_output=correlation("output"),
        correlation_added=correlation("tokens_added"),
        images=len(of("tokens")[0]),
        gap_max=[values.amax(0).tolist() for values in of("gap")],
        **mean,
    )


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, tied values sharing the mean of theirs.

    NaN where it is undefined: fewer than two pairs, a NaN among the values, or all values of one side equal.

    Raises:
        ValueError: sequences of different lengths.
    """
    if len(x) != len(y):
        raise ValueError(f"x and y must be of one length, got {len(x)} and {len(y)}")
    both = torch.tensor([list(x), list(y)], dtype=torch.float64)
    if len(x) < 2 or both.isnan().any():
        return math.nan
    a, b = _centred_ranks(both[0]), _centred_ranks(both[1])
    norm = (a @ a * (b @ b)).sqrt()
    return (a @ b / norm).clamp(-1, 1).item() if norm > 0 else math.nan


def _centred_ranks(values: Tensor) -> Tensor:
    _, position, count = values.unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2).double()[position]
    return rank - rank.mean()
