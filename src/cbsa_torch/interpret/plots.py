"""Figures of measurements, and of attention maps over images. Everything measured is measured elsewhere."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from cbsa_torch._core.checks import check_number
from cbsa_torch.interpret import _style
from cbsa_torch.interpret._style import BLUE, GREY, ORANGE, layer_ticks, signed
from cbsa_torch.interpret.attention_maps import upsample_maps
from cbsa_torch.interpret.certificate import LayerCertificate
from cbsa_torch.interpret.rates import LayerRates, ReducedRates
from cbsa_torch.interpret.robustness import Robustness
from cbsa_torch.interpret.structure import AttentionRanks, Sparsity

RATE, NORMALIZED_RATE = "$R^c(Z^\\ell\\,|\\,U^\\ell)$ (nats)", "normalised $R^c$ (nats)"
"""Labels of the two compression terms."""

Curve = tuple[Sequence[int], Sequence[float]]
"""Numbers of layers, from 1, and a value for each."""


def learning_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    colors: Mapping[str, str] | None = None,
    *,
    score: str = "val_top1",
    score_title: str = "accuracy",
) -> Figure:
    """Loss and validation score against the epoch; the training loss is dotted.

    Args:
        histories: name of a run to its rows, one per epoch, with epoch, train_loss, val_loss and the score.
            Values that are missing or not finite leave gaps. The legend leaves out a run whose name is empty.
        colors: of each name. Default: those of :func:`cbsa_torch.interpret._style.run_colors`.
        score: key of the validation score in the rows, a share of 1.
        score_title: what the score is called.
    """
    figure, (left, right) = _figure(2, len(histories))
    colors = _style.run_colors(histories) if colors is None else colors
    for name, history in histories.items():
        epochs, color = [row["epoch"] for row in history], colors[name]
        _style.curve(left, epochs, _series(history, "train_loss"), ":", color=color, linewidth=1.1)
        _style.curve(left, epochs, _series(history, "val_loss"), color=color, label=_style.run_label(name))
        _style.curve(right, epochs, 100 * _series(history, score), color=color)
    left.set(xlabel="epoch", ylabel="loss (dotted: training)")
    _style.from_zero(left)
    right.set(xlabel="epoch", ylabel=f"validation {score_title} (%)")
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _style.runs_legend(left)
    return _style.finish(figure)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One value of every epoch, NaN where it is missing or not finite, as the loss of a run that diverged."""
    values = np.array([np.nan if row.get(key) is None else row[key] for row in history], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def layer_curves(
    panels: Mapping[str, Mapping[str, Curve]], colors: Mapping[str, str], *, from_zero: bool = False
) -> Figure:
    """Values of several runs against the layer, a panel for each kind of value.

    Args:
        panels: label of a vertical axis to the curves of runs, by name.
        colors: of each name.
        from_zero: vertical axes begin at 0.
    """
    figure, axes = _figure(len(panels), max(len(curves) for curves in panels.values()))
    for axis, (label, curves) in zip(axes, panels.items(), strict=True):
        for name, (numbers, values) in curves.items():
            _style.line(axis, numbers, values, color=colors[name], label=_style.run_label(name))
        ticks = layer_ticks([number for numbers, _ in curves.values() for number in numbers])
        axis.set(xlabel="layer", ylabel=label, xticks=ticks)
        if from_zero:
            _style.from_zero(axis)
    _style.runs_legend(axes[0])
    return _style.finish(figure)


def _figure(panels: int, runs: int) -> tuple[Figure, Any]:
    """A figure of one or two panels with room for the legend of ``runs``, and its axes."""
    height = 2.8 + 0.16 * runs  # about 0.16 inches a line
    figure = Figure(figsize=(7.5 if panels > 1 else 6.4, height), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def rates_per_layer(rates: LayerRates) -> Figure:
    """The compression term against the layer, as it is and normalised."""
    figure = Figure(figsize=(7.5, 2.9), layout="constrained")
    axes = figure.subplots(1, 2)
    layers = range(1, len(rates.layers) + 1)
    panels = (
        (axes[0], rates.rate, rates.rate_std, BLUE, RATE),
        (axes[1], rates.normalized, rates.normalized_std, ORANGE, NORMALIZED_RATE),
    )
    for axis, mean, std, color, label in panels:
        axis.fill_between(
            layers, np.subtract(mean, std), np.add(mean, std), color=color, alpha=0.15, linewidth=0
        )
        _style.line(axis, layers, mean, color=color)
        axis.set(xlabel="layer", ylabel=label, xticks=layer_ticks(layers))
    return _style.finish(figure)


def certified_rates(layers: Sequence[LayerCertificate], numbers: Sequence[int]) -> Figure:
    """Rates before and after each certified step: of the representatives, and of all tokens.

    Sums over heads, means over images. Orange marks how much of the representatives' rate may be left.

    Args:
        layers: with certified steps; a broken certificate guarantees nothing.
        numbers: as in :func:`reduced_rates_panel`.
    """
    figure = Figure(figsize=(7.5, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)

    def total(values: Tensor) -> float:
        return values.sum(1).mean().item()

    panels = (
        (left, "representatives", [(total(x.before), total(x.after)) for x in layers]),
        (right, "all tokens", [(total(x.tokens_before), total(x.tokens_after)) for x in layers]),
    )
    for axis, what, rates in panels:
        before, after = zip(*rates, strict=True)
        axis.vlines(numbers, before, after, color=BLUE, linewidth=1.6, alpha=0.5)
        axis.plot(numbers, before, "o", color=GREY, markersize=6, label="before")
        axis.plot(numbers, after, "o", color=BLUE, markersize=6, label="after")
        axis.set(xlabel="layer", ylabel=f"rate of {what} (nats)", xticks=layer_ticks(numbers))
        axis.margins(x=0.12)
    limits = [
        (n, total(x.before - x.guaranteed))
        for n, x in zip(numbers, layers, strict=True)
        if x.guaranteed is not None
    ]
    if limits:
        left.plot(
            *zip(*limits, strict=True),
            "_",
            color=ORANGE,
            markersize=18,
            markeredgewidth=2,
            label="guaranteed: at most",
        )
    for axis in (left, right):
        _style.legend(
            axis, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, columnspacing=1.0, handletextpad=0.5
        )
    return _style.finish(figure)


def attention_panel(
    images: np.ndarray, maps: Sequence[tuple[str, np.ndarray]], titles: Sequence[str]
) -> Figure:
    """A row per image: the image, then its map at each layer.

    Args:
        images: ``(B, height, width)`` or ``(B, height, width, 3)`` in [0, 1].
        maps: per layer its name and ``(B, rows, columns)``.
        titles: one per image.
    """
    rows = [(image, [values[i] for _, values in maps]) for i, image in enumerate(images)]
    figure = _image_grid(rows, titles, cell=(1.35, 1.5), fontsize=8)
    for axis, name in zip(figure.axes, ("image", *(name for name, _ in maps)), strict=False):
        axis.set_title(name, fontsize=8)
    return figure


def receptive_field_panel(image: np.ndarray, fields: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """A row per layer: the image, then the receptive field of each representative.

    Args:
        image: ``(height, width[, 3])`` in [0, 1].
        fields: per layer its name and ``(M, rows, columns)``.
    """
    rows = [(image, [*values]) for _, values in fields]
    return _image_grid(rows, [name for name, _ in fields], cell=(0.62, 0.8), fontsize=7)


def _image_grid(
    rows: Sequence[tuple[np.ndarray, list[np.ndarray]]],
    labels: Sequence[str],
    cell: tuple[float, float],
    fontsize: int,
) -> Figure:
    """Rows of an image and maps; ``cell`` is the width and height of one in inches."""
    columns = 1 + max(len(maps) for _, maps in rows)
    figure = Figure(figsize=(cell[0] * columns, cell[1] * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (image, maps), label in zip(grid, rows, labels, strict=True):
        axes[0].imshow(image, cmap="gray", vmin=0, vmax=1)
        axes[0].set_ylabel(_style.legible(label), fontsize=fontsize, parse_math=False)
        for axis, values in zip(axes[1:], maps, strict=False):
            axis.imshow(values, cmap="magma")
        for axis in axes:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    return figure


def overlay(
    image: np.ndarray, attention_map: np.ndarray, *, colormap: str = "magma", alpha: float = 0.5
) -> np.ndarray:
    """Lay an attention map over an image, in the colours of matplotlib.

    Args:
        image: ``(height, width)`` or ``(height, width, 3)`` in [0, 1].
        attention_map: ``(rows, columns)``, resized to the image and scaled from its least to its largest value;
            a constant map takes the colour of the least.
        colormap: a name that matplotlib knows.
        alpha: share of the map in the blend, 0 to 1.

    Returns:
        ``(height, width, 3)`` float32 in [0, 1].

    Raises:
        ValueError: shapes, values or names that do not fit.

    Examples:
        >>> import numpy as np
        >>> from cbsa_torch.interpret import overlay
        >>> overlay(np.zeros((64, 48)), np.eye(8)).shape
        (64, 48, 3)
    """
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)) or 0 in image.shape:
        raise ValueError(f"image must be (height, width) or (height, width, 3), got shape {image.shape}")
    if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
        raise ValueError("image must hold values in [0, 1]; divide 8-bit values by 255")
    if attention_map.ndim != 2 or not np.isfinite(attention_map).all():
        raise ValueError(f"attention_map must be finite (rows, columns), got shape {attention_map.shape}")
    check_number("alpha", alpha)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if colormap not in mpl.colormaps:
        raise ValueError(f"colormap must be a name in matplotlib.colormaps, got {colormap!r}")
    resized = upsample_maps(torch.from_numpy(np.asarray(attention_map, np.float64)), image.shape[:2]).numpy()
    spread = resized.max() - resized.min()
    scaled = (resized - resized.min()) / spread if spread > 0 else np.zeros_like(resized)
    colors = mpl.colormaps[colormap](scaled)[..., :3]
    base = image if image.ndim == 3 else image[..., None]
    return ((1 - alpha) * base + alpha * colors).astype(np.float32)


def to_svg(figure: Figure, salt: str = "", **options: Any) -> str:
    """The figure as an SVG element; the same figure, ``salt`` and options of ``savefig`` give the same text."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, **options)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def to_png(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def reduced_rates_panel(reduced: ReducedRates, numbers: Sequence[int]) -> Figure:
    """Rates that CBSA reduces, tokens against representatives (the paper's Fig. 6).

    Above: per layer, the mean over heads and the heads' range; the left panel, of what loses most of its rate,
    and the right one, of what a step changes a little, have scales of their own. Below: every head of every
    layer, for three readings of "after CBSA" (see :func:`cbsa_torch.interpret.reduced_rates`), with its rank
    correlation.

    Args:
        reduced: the measurement.
        numbers: the number of each of its layers among all attention layers of the model, from 1.
    """
    figure = Figure(figsize=(9.2, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(1, 1.15))
    left, right = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    curves = (
        (left, reduced.representatives, ORANGE, "representatives: Q, then C"),
        (left, reduced.output, BLUE, "output: W, then A C"),
        (right, reduced.tokens, BLUE, "tokens, $\\kappa = 1$: W, then W \N{MINUS SIGN} A C"),
        (right, reduced.tokens_learned, GREY, "tokens, $\\kappa$ learned: W, then W + $\\kappa$ A C"),
    )
    for axis, heads, color, label in curves:
        _style.band(axis, numbers, heads, color, label)
    for axis in (left, right):
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set(xlabel="layer", ylabel="rate reduced (nats)", xticks=layer_ticks(numbers))
        axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    panels = (
        (reduced.output, "output", reduced.correlation_output),
        (reduced.tokens, "tokens, $\\kappa = 1$", reduced.correlation),
        (reduced.tokens_learned, "tokens, $\\kappa$ learned", reduced.correlation_learned),
    )
    for column, (ours, title, correlation) in enumerate(panels):
        axis = figure.add_subplot(grid[1, 2 * column : 2 * column + 2])
        for i, (row, across, layer) in enumerate(zip(ours, reduced.representatives, numbers, strict=True)):
            # early layers are light, late ones dark
            shade = mpl.colormaps["viridis_r"](0.2 + 0.8 * i / max(len(numbers) - 1, 1))
            axis.scatter(across, row, s=24, color=shade, label=f"{layer}", edgecolors="white", linewidths=0.4)
        if column > 0:
            axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set(xlabel="representatives (nats)", ylabel=f"{title} (nats)")
        axis.set_title(f"rank correlation {signed(correlation)}", fontsize=9)
    style: dict[str, Any] = {"frameon": False, "fontsize": 7, "title_fontsize": 7}
    style |= {"ncols": 1 if len(numbers) <= 8 else 2, "handletextpad": 0.1, "columnspacing": 0.8}
    figure.axes[-1].legend(title="layer", loc="center left", bbox_to_anchor=(1.0, 0.5), **style)
    return _style.finish(figure)


def step_sizes(steps: Sequence[Sequence[float]], numbers: Sequence[int]) -> Figure:
    """The learned step kappa of every head as a signed heat map: the direction of Eq. 6 is orange.

    The layer adds kappa times the contraction and Eq. 6 subtracts it, so negative values follow Eq. 6.

    Args:
        steps: ``[layer][head]``.
        numbers: as in :func:`reduced_rates_panel`.
    """
    return _heat_map(steps, numbers, "$\\kappa$ (negative: the direction of Eq. 6)")


def compressing_heads(reduced: ReducedRates, numbers: Sequence[int]) -> Figure:
    """Which heads compress the tokens with their learned step (blue), and which decompress (orange)."""
    return _heat_map(reduced.tokens_learned, numbers, "rate reduced by the layer's step (nats)")


def coherence_maps(coherence: Mapping[str, Tensor], numbers: Sequence[int]) -> Figure:
    """Largest cosine between the subspaces of every two heads, a square per layer; 0 is orthogonal."""
    count = len(coherence)
    columns = min(6, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.5 * columns + 0.9, 1.6 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis, values, number in zip(axes, coherence.values(), numbers, strict=False):
        image = axis.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=1)
        heads = np.arange(len(values))
        axis.set_title(f"layer {number}", fontsize=8)
        labels = [str(h + 1) if len(heads) <= 8 or h % 4 == 3 else "" for h in heads]
        axis.set_xticks(heads, labels, fontsize=7)
        axis.set_yticks(heads, labels, fontsize=7)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    _color_bar(figure.colorbar(image, ax=list(axes), shrink=0.8, aspect=18), "largest cosine")
    return figure


def gap_per_layer(reduced: ReducedRates, numbers: Sequence[int]) -> Figure:
    """The constraint gap (Eq. 4 bounds it by tau) against the layer: mean over heads, with the heads' range."""
    figure, (axis,) = _figure(1, 0)
    _style.band(axis, numbers, reduced.gap, BLUE)
    return _finish_layers(figure, axis, numbers, "constraint gap (nats)")


def ranks_per_layer(ranks: AttentionRanks, numbers: Sequence[int]) -> Figure:
    """Rank and effective rank of A against the layer: mean over heads, with the heads' range."""
    figure, (axis,) = _figure(1, 0)
    _style.band(axis, numbers, ranks.rank, GREY, "numerical rank")
    _style.band(axis, numbers, ranks.effective_rank, BLUE, "effective rank")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    _style.legend(axis)
    return _finish_layers(figure, axis, numbers, "rank of A")


def sparsity_per_layer(sparsity: Sparsity, numbers: Sequence[int]) -> Figure:
    """Share of exact zeros after each ISTA."""
    figure, (axis,) = _figure(1, 0)
    axis.bar(numbers, [100 * share for share in sparsity.zeros], color=BLUE, width=0.7)
    _finish_layers(figure, axis, numbers, "exact zeros after ISTA (%)")
    axis.set_ylim(0, 100)
    axis.grid(visible=False, axis="x")
    axis.set_axisbelow(True)
    return figure


def _finish_layers(figure: Figure, axis: Any, numbers: Sequence[int], label: str) -> Figure:
    """Name the axes of values that begin at 0 against the layer."""
    axis.set(xlabel="layer", ylabel=label, ylim=(0, None), xticks=layer_ticks(numbers))
    return _style.finish(figure)


def robustness_curve(
    curves: Mapping[str, Robustness], metric: str, colors: Mapping[str, str] | None = None
) -> Figure:
    """A metric against the noise on the parameters: mean over seeds, the seeds' range shaded, each a dot.

    Args:
        curves: name of a model to its measurement. The legend leaves out a model whose name is empty.
        metric: label of the vertical axis. A dashed line shows it without noise.
        colors: of each name. Default: those of :func:`cbsa_torch.interpret._style.run_colors`.
    """
    figure, (axis,) = _figure(1, len(curves))
    colors = _style.run_colors(curves) if colors is None else colors
    for name, measured in curves.items():
        color = colors[name]
        order = np.argsort(measured.sigmas)
        sigmas, values = np.asarray(measured.sigmas)[order], np.asarray(measured.values)[order]
        axis.fill_between(sigmas, values.min(1), values.max(1), color=color, alpha=0.15, linewidth=0)
        axis.plot(sigmas, values.mean(1), color=color, label=_style.run_label(name))
        axis.plot(sigmas, values, ".", color=color, markersize=4)
        axis.axhline(measured.clean, color=color, linestyle="--", linewidth=0.9)
    positive = [sigma for measured in curves.values() for sigma in measured.sigmas if sigma > 0]
    if positive:  # a logarithmic axis that still has a place for sigma = 0
        axis.set_xscale("symlog", linthresh=min(positive))
        axis.set_xlim(0 if any(0 in m.sigmas for m in curves.values()) else min(positive) / 1.15, None)
    axis.set_xlabel("standard deviation $\\sigma$ of the noise on attention parameters")
    axis.set_ylabel(metric, parse_math=False)
    _style.runs_legend(axis)
    return _style.finish(figure)


def _heat_map(rows: Sequence[Sequence[float]], numbers: Sequence[int], label: str) -> Figure:
    """A cell per layer (across) and head (down) with its value written in it: orange below zero, blue above."""
    grid = np.full((len(rows), max(len(row) for row in rows)), np.nan)  # some layers may have fewer heads
    for index, row in enumerate(rows):
        grid[index, : len(row)] = np.where(np.isfinite(row), row, np.nan)
    layers, heads = grid.shape
    most = max(float(np.nan_to_num(np.abs(grid)).max()), 1e-12)
    colors = LinearSegmentedColormap.from_list("signed", [ORANGE, "#f4f4f4", BLUE])
    figure = Figure(figsize=(1.6 + 0.52 * layers, 1.3 + 0.34 * heads), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid.T, cmap=colors, vmin=-most, vmax=most, aspect="auto")
    for (layer, head), value in np.ndenumerate(grid):
        if np.isfinite(value):
            text = signed(value, 2 if most < 10 else 0)
            color = "white" if abs(value) > 0.6 * most else "#333333"
            axis.text(layer, head, text, ha="center", va="center", fontsize=7, color=color)
    axis.set(xlabel="layer", ylabel="head")
    axis.set_xticks(np.arange(layers), [str(number) for number in numbers])
    axis.set_yticks(np.arange(heads), [str(i + 1) for i in range(heads)])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    _color_bar(figure.colorbar(image, ax=axis, aspect=14), label)
    return figure


def _color_bar(bar: Any, label: str) -> None:
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
