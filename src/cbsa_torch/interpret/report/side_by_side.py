"""What a comparison shows: figures of all runs on one axis, figures of each run, and the table of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from cbsa_torch.interpret import overlays, plots
from cbsa_torch.interpret.overlays import Curve
from cbsa_torch.interpret.report import page, statements
from cbsa_torch.interpret.report.maps import Maps, Pictures
from cbsa_torch.interpret.report.measure import Measures

OWN = ("reduced_rates", "step_sizes", "compressing_heads", "coherence")
"""Figures of one run each: their values do not fit one axis."""

SIGMA = 0.1
"""Of the noise whose effect is in the table."""

NONE = "\N{EN DASH}"


class ComparedRun(NamedTuple):
    """A model with what it is fed and what is known of it."""

    name: str
    """What the page calls it; no two the same."""
    model: nn.Module
    """In eval mode, with mixers of ours or timm's attention."""
    inputs: Tensor
    """``(B, C, height, width)``; the same images for all models, each at its own size."""
    images: np.ndarray
    """``(B, height, width[, 3])`` the same in [0, 1]."""
    labels: Sequence[int] | None
    """The same for all models, or None for all."""
    kind: str
    """The model's own name."""
    parameters: int
    flops: int
    """For one image, two per multiply-add."""
    accuracy: float | None
    image_titles: Sequence[str] | None = None
    history: Sequence[dict[str, Any]] = ()
    """One row per epoch, as :func:`cbsa_torch.interpret.report` takes them."""


class Looked(NamedTuple):
    """A run with what was measured of it."""

    run: ComparedRun
    measures: Measures
    maps: Maps
    pictures: Pictures


def overlaid(looked: Sequence[Looked], colors: Mapping[str, str]) -> dict[str, Figure]:
    """Figures that hold the curves of all runs that have them."""

    def curves(values: Callable[[Measures], tuple[Sequence[str], Sequence[float]] | None]) -> dict[str, Curve]:
        found = {}
        for item in looked:
            given = values(item.measures)
            if given is not None:
                found[item.run.name] = Curve(page.numbers(item.measures)(given[0]), given[1])
        return found

    def reduced_gap(m: Measures) -> tuple[Sequence[str], Sequence[float]] | None:
        return None if m.reduced is None else (m.reduced.layers, _means(m.reduced.gap))

    def coherence(m: Measures) -> tuple[Sequence[str], Sequence[float]] | None:
        return None if not m.coherence else ([*m.coherence], [mean_coherence(c) for c in m.coherence.values()])

    figures = {
        "coding_rate": {
            plots.RATE: curves(lambda m: (m.rates.layers, m.rates.rate)),
            plots.NORMALIZED_RATE: curves(lambda m: (m.rates.layers, m.rates.normalized)),
        },
        "gap": {"constraint gap (nats)": curves(reduced_gap)},
        "sparsity": {
            "exact zeros after ISTA (%)": curves(
                lambda m: m.sparsity and (m.sparsity.layers, [100 * share for share in m.sparsity.zeros])
            )
        },
        "coherence": {"mean largest cosine": curves(coherence)},
        "ranks": {
            "rank of A": curves(lambda m: m.ranks and (m.ranks.layers, _means(m.ranks.rank))),
            "effective rank of A": curves(
                lambda m: m.ranks and (m.ranks.layers, _means(m.ranks.effective_rank))
            ),
        },
    }
    drawn = {
        name: overlays.layer_curves(panels, colors, from_zero=name != "coding_rate")
        for name, panels in figures.items()
        if any(panels.values())
    }
    histories = {item.run.name: item.run.history for item in looked if item.run.history}
    if histories:
        drawn["learning_curves"] = overlays.learning_curves(histories, colors)
    robust = {
        item.run.name: item.measures.robustness for item in looked if item.measures.robustness is not None
    }
    if robust:
        drawn["robustness"] = plots.robustness_curve(robust, looked[0].measures.robustness_metric, colors)
    return drawn


def own_figures(item: Looked) -> dict[str, Figure]:
    """Figures of one run that stand side by side, as its report has them."""
    drawn = page.measure_figures(item.measures)
    return {name: drawn[name] for name in OWN if name in drawn}


def mean_coherence(cosines: Tensor) -> float:
    """Mean over pairs of different heads; NaN for one head."""
    heads = len(cosines)
    others = cosines[~np.eye(heads, dtype=bool)]
    return float(others.mean()) if heads > 1 else math.nan


def table(looked: Sequence[Looked]) -> list[tuple[str, list[str]]]:
    """Rows of numbers: what they are, and one for each run."""

    def row(name: str, text: Callable[[Looked], str]) -> tuple[str, list[str]]:
        return name, [text(item) for item in looked]

    def of_reduced(name: str, field: str) -> tuple[str, list[str]]:
        return row(name, lambda i: _number(getattr(i.measures.reduced, field, None), "+.2f"))

    kept = "same predictions" if looked[0].run.labels is None else "accuracy"
    return [
        row("model", lambda i: i.run.kind),
        row("parameters", lambda i: f"{i.run.parameters:,}"),
        row("GFLOPs", lambda i: f"{i.run.flops / 1e9:.3g}"),
        row("accuracy", lambda i: _percent(i.run.accuracy, ".2f")),
        row("attention layers", lambda i: str(len(i.measures.rates.layers))),
        row("Rᶜ, last layer", lambda i: _number(i.measures.rates.rate[-1], ".1f")),
        row("normalised Rᶜ, last layer", lambda i: _number(i.measures.rates.normalized[-1], ".1f")),
        row("Rᶜ over the later half", lambda i: _later_half(i.measures)),
        of_reduced("correlation, κ = 1", "correlation"),
        of_reduced("correlation, κ = 1 the other way", "correlation_added"),
        of_reduced("correlation, κ learned", "correlation_learned"),
        of_reduced("correlation, output", "correlation_output"),
        row("heads that compress", lambda i: _compressing(i.measures)),
        row("zeros after ISTA, mean", lambda i: _zeros(i.measures)),
        row(f"{kept} at \N{GREEK SMALL LETTER SIGMA} = {SIGMA}", lambda i: _robust(i.measures)),
    ]


def _later_half(measures: Measures) -> str:
    found = statements.later_half(measures.rates)
    return NONE if found is None else _percent(found.change, "+.1f")


def _compressing(measures: Measures) -> str:
    if measures.reduced is None:
        return NONE
    effects = [effect for row in measures.reduced.tokens_learned for effect in row]
    return f"{sum(effect > 0 for effect in effects)} of {len(effects)}"


def _zeros(measures: Measures) -> str:
    return NONE if measures.sparsity is None else _percent(_mean(measures.sparsity.zeros))


def _robust(measures: Measures) -> str:
    robust = measures.robustness
    if robust is None or SIGMA not in robust.sigmas:
        return NONE
    return _percent(_mean(robust.values[robust.sigmas.index(SIGMA)]))


def _percent(value: float | None, form: str = ".1f") -> str:
    return NONE if value is None or not math.isfinite(value) else f"{100 * value:{form}} %"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None or not math.isfinite(value) else format(value, form)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _means(heads: Sequence[Sequence[float]]) -> list[float]:
    return [_mean(row) for row in heads]
