"""Several models on one page: the same measures of each, on the same images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from cbsa_torch.interpret import _style, plots
from cbsa_torch.interpret.certificate import Certificate
from cbsa_torch.interpret.pages import render
from cbsa_torch.interpret.pages.maps import MOST_PICTURES, Maps, Pictures, measure_maps
from cbsa_torch.interpret.pages.measures import Measures, measure_model
from cbsa_torch.interpret.pages.render import PageFiles
from cbsa_torch.interpret.pages.sentences import later_change, sentences
from cbsa_torch.interpret.plots import Curve

PREFIX = "compare_"
"""Beginning of the figures' file names: the folder may hold a report, too."""

RUN_FIGURES = ("reduced_rates", "step_sizes", "compressing_heads", "coherence")
"""Figures that each run has one of, side by side: their values do not fit one axis."""

SIGMA = 0.1
"""Standard deviation of the noise whose effect is in the table."""

NOTHING = "\N{EN DASH}"
"""In the table, for a number that a run does not have."""


class ComparedRun(NamedTuple):
    """A model, what it is fed, and what is known of it.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import ComparedRun
        >>> model = timm.create_model("cbt_pico_patch1_8").eval()
        >>> run = ComparedRun("ours", model, torch.rand(8, 1, 8, 8), accuracy=0.98)
        >>> run.labels is None, run.history
        (True, ())
    """

    name: str
    """What the page calls the run; no two may have the same."""
    model: nn.Module
    """In eval mode, with mixers of this library or timm's attention."""
    images: Tensor
    """``(B, C, height, width)`` what the model is fed: the same images for all models, each at its own size."""
    labels: Sequence[int] | None = None
    """B class indices, for the robustness curve; the same for all models, or None for all."""
    pictures: Pictures | None = None
    """The images whose attention maps are shown. Default: the first six of ``images``."""
    architecture: str | None = None
    """What the model is called. Default: its class."""
    flops: int | None = None
    """For one image, two per multiply-add."""
    accuracy: float | None = None
    """In [0, 1]."""
    history: Sequence[Mapping[str, Any]] = ()
    """One row per epoch, as :func:`cbsa_torch.interpret.report` takes them."""


class MeasuredRun(NamedTuple):
    """A run and what was measured of it."""

    run: ComparedRun
    architecture: str
    parameters: int
    measures: Measures
    sentences: dict[str, str]
    maps: Maps
    pictures: Pictures


def compare(
    runs: Sequence[ComparedRun],
    folder: str | Path,
    *,
    title: str | None = None,
    score: str = "val_top1",
    score_title: str = "accuracy",
    batch_size: int = 64,
    robustness_images: int = 128,
) -> PageFiles:
    """Write ``compare.html``, ``compare.json`` and ``figures/compare_*`` into ``folder``.

    What a report shows of one model is here shown of all: curves on one axis where they fit it, else side by
    side. A run has one colour everywhere. Figures of an earlier comparison in ``folder`` are replaced.

    Args:
        runs: two models or more.
        folder: where to write; made if it does not exist.
        title: heading of the page. Default: the number of models.
        score: key of the validation score in the rows of the runs' ``history``.
        score_title: what that score is called.
        batch_size: images per forward pass.
        robustness_images: how many of the images (the first) the robustness curves use; 0 leaves them out.

    Returns:
        The paths of page, numbers and figures.

    Raises:
        ValueError: fewer than two runs, two of one name, different numbers of images, labels of some runs only
            or different ones, or for one of the models what :func:`cbsa_torch.interpret.report` raises.
        TypeError: numbers of images that are not ints.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import ComparedRun, compare
        >>> images = torch.rand(8, 1, 8, 8)
        >>> names = ["cbt_pico_patch1_8", "crate_pico_patch1_8"]
        >>> runs = [ComparedRun(name, timm.create_model(name, depth=1).eval(), images) for name in names]
        >>> compare(runs, "page", robustness_images=0).page.name
        'compare.html'
    """
    _check_runs(runs)
    title = f"{len(runs)} models" if title is None else title
    colors = _style.run_colors(run.name for run in runs)
    measured = [measure_run(run, batch_size, robustness_images) for run in runs]
    folder = Path(folder)
    shared = shared_figures(measured, colors, score, score_title)
    written = render.save_figures(shared, folder, PREFIX)
    sections = []
    for number, item in enumerate(measured, 1):
        figures = render.measure_figures(item.measures)
        figures = {name: figures[name] for name in RUN_FIGURES if name in figures}
        of_maps = render.map_figures(item.maps, item.pictures)
        files = {f"{name}_{number}": figure for name, figure in {**figures, **of_maps}.items()}
        written += render.save_figures(files, folder, PREFIX)
        sections.append(
            {
                "run": item.run,
                "color": colors[item.run.name],
                "measures": item.measures,
                "sentences": item.sentences,
                "figures": render.panels(figures, f"-{number}", f": {item.run.name}"),
                "maps": render.map_section(item.maps, item.pictures, of_maps),
                "left_out": render.left_out(item.measures, item.maps, item.run.history),
            }
        )
    page = render.fill(
        "compare.html.j2",
        title=title,
        runs=sections,
        table=summary_table(measured),
        images=len(runs[0].images),
        robustness_images=measured[0].measures.robustness_images,
        robustness_metric=measured[0].measures.robustness_metric,
        figures=render.panels(shared),
        has_maps=any(section["maps"] for section in sections),
    )
    numbers = {"title": title, "runs": [_numbers(item) for item in measured]}
    out = PageFiles(folder / "compare.html", folder / "compare.json", written)
    return render.write_page(out, page, numbers, PREFIX)


def _check_runs(runs: Sequence[ComparedRun]) -> None:
    names = [run.name for run in runs]
    if len(runs) < 2 or len(set(names)) < len(names):
        raise ValueError(f"runs must be two or more with different names, got {names}")
    sizes = {len(run.images) for run in runs}
    if len(sizes) > 1:
        raise ValueError(f"runs must have the same images, got {sorted(sizes)} images")
    without = [run.name for run in runs if run.labels is None]
    if 0 < len(without) < len(runs):
        raise ValueError(f"runs must all have labels or none, for one axis of robustness: {without} have none")
    first = runs[0]
    for run in runs[1:]:
        if run.labels is not None and first.labels is not None and list(run.labels) != list(first.labels):
            raise ValueError(f"runs must have the same labels: those of {first.name} and {run.name} differ")


def measure_run(run: ComparedRun, batch_size: int, robustness_images: int) -> MeasuredRun:
    """Measure a run; arguments are those of :func:`compare`."""
    sizes = {"batch_size": batch_size, "robustness_images": robustness_images}
    measures = measure_model(run.model, run.images, labels=run.labels, **sizes)
    pictures = Pictures.of(run.images[:MOST_PICTURES]) if run.pictures is None else run.pictures
    return MeasuredRun(
        run=run,
        architecture=type(run.model).__name__ if run.architecture is None else run.architecture,
        parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        measures=measures,
        sentences=sentences(measures),
        maps=measure_maps(run.model, pictures),
        pictures=pictures,
    )


def _numbers(item: MeasuredRun) -> dict[str, Any]:
    return {
        "name": item.run.name,
        "model": item.architecture,
        "parameters": item.parameters,
        "flops": item.run.flops,
        "accuracy": item.run.accuracy,
        "history": list(item.run.history),
        **render.numbers_of(item.measures, item.sentences, item.maps),
    }


def shared_figures(
    measured: Sequence[MeasuredRun],
    colors: Mapping[str, str],
    score: str = "val_top1",
    score_title: str = "accuracy",
) -> dict[str, Figure]:
    """Figures that hold the curves of all runs that have them."""
    curves: dict[str, dict[str, dict[str, Curve]]] = {}

    def add(figure: str, axis: str, item: MeasuredRun, layers: Sequence[str], values: Sequence[float]) -> None:
        numbers = render.layer_numbers(item.measures, layers)
        curves.setdefault(figure, {}).setdefault(axis, {})[item.run.name] = (numbers, values)

    for item in measured:
        m = item.measures
        add("coding_rate", plots.RATE, item, m.rates.layers, m.rates.rate)
        add("coding_rate", plots.NORMALIZED_RATE, item, m.rates.layers, m.rates.normalized)
        if m.reduced is not None:
            add("gap", "constraint gap (nats)", item, m.reduced.layers, _means(m.reduced.gap))
        if m.sparsity is not None:
            percent = [100 * share for share in m.sparsity.zeros]
            add("sparsity", "exact zeros after ISTA (%)", item, m.sparsity.layers, percent)
        if m.coherence:
            means = [mean_coherence(cosines) for cosines in m.coherence.values()]
            add("coherence", "mean largest cosine", item, [*m.coherence], means)
        if m.ranks is not None:
            add("ranks", "rank of A", item, m.ranks.layers, _means(m.ranks.rank))
            add("ranks", "effective rank of A", item, m.ranks.layers, _means(m.ranks.effective_rank))
    figures = {
        name: plots.layer_curves(panels, colors, from_zero=name != "coding_rate")
        for name, panels in curves.items()
    }
    if histories := {item.run.name: item.run.history for item in measured if item.run.history}:
        figures["learning_curves"] = plots.learning_curves(
            histories, colors, score=score, score_title=score_title
        )
    if robust := {item.run.name: r for item in measured if (r := item.measures.robustness) is not None}:
        figures["robustness"] = plots.robustness_curve(robust, measured[0].measures.robustness_metric, colors)
    return figures


def mean_coherence(cosines: Tensor) -> float:
    """Mean over pairs of different heads of ``(H, H)`` cosines; NaN for one head."""
    heads = len(cosines)
    return float(cosines[~np.eye(heads, dtype=bool)].mean()) if heads > 1 else math.nan


def summary_table(measured: Sequence[MeasuredRun]) -> list[tuple[str, list[str]]]:
    """Rows of the table: what a number is, and the number of each run."""
    columns = [_column(item) for item in measured]
    return [(name, [column[name] for column in columns]) for name in columns[0]]


def _column(item: MeasuredRun) -> dict[str, str]:
    run, measures = item.run, item.measures
    rates, reduced, sparsity, robust = measures.rates, measures.reduced, measures.sparsity, measures.robustness
    effects = [] if reduced is None else list(itertools.chain(*reduced.tokens_learned))
    kept = "same predictions" if run.labels is None else "accuracy"
    noisy = robust.values[robust.sigmas.index(SIGMA)] if robust is not None and SIGMA in robust.sigmas else None
    return {
        "model": item.architecture,
        "parameters": f"{item.parameters:,}",
        "GFLOPs": NOTHING if run.flops is None else f"{run.flops / 1e9:.3g}",
        "accuracy": _percent(run.accuracy, ".2f"),
        "attention layers": str(len(rates.layers)),
        "Rᶜ, last layer": _number(rates.rate[-1], ".1f"),
        "normalised Rᶜ, last layer": _number(rates.normalized[-1], ".1f"),
        "Rᶜ over the later half": _percent(later_change(rates.rate), "+.1f"),
        "correlation, κ = 1": _number(reduced and reduced.correlation, "+.2f"),
        "correlation, κ = 1 the other way": _number(reduced and reduced.correlation_added, "+.2f"),
        "correlation, κ learned": _number(reduced and reduced.correlation_learned, "+.2f"),
        "correlation, output": _number(reduced and reduced.correlation_output, "+.2f"),
        "certificate": NOTHING if measures.certificate is None else _held(measures.certificate),
        "heads that compress": f"{sum(e > 0 for e in effects)} of {len(effects)}" if effects else NOTHING,
        "zeros after ISTA, mean": _percent(sparsity and _mean(sparsity.zeros)),
        f"{kept} at \N{GREEK SMALL LETTER SIGMA} = {SIGMA}": _percent(None if noisy is None else _mean(noisy)),
    }


def _held(certificate: Certificate) -> str:
    """In how many cases the certificate holds, and in how many that shows something."""
    sound = certificate.cases - certificate.void
    notes = []
    if certificate.beyond_rounding < sound:
        notes.append(f"{certificate.beyond_rounding:,} beyond rounding")
    if certificate.void:
        notes.append(f"{certificate.void:,} more have no certificate")
    return f"{certificate.holding:,} of {sound:,}" + (f" ({'; '.join(notes)})" if notes else "")


def _percent(value: float | None, form: str = ".1f") -> str:
    return _number(None if value is None else 100 * value, form, " %")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NOTHING if value is None or not math.isfinite(value) else f"{value:{form}}{unit}"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _means(heads: Sequence[Sequence[float]]) -> list[float]:
    return [_mean(row) for row in heads]
