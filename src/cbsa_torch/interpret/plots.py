"""Figures from measurements. Draws only: nothing is computed here."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from cbsa_torch.interpret import _look
from cbsa_torch.interpret._look import BLUE, GREY, ORANGE, layer_ticks, signed
from cbsa_torch.interpret.rates import LayerRates, ReducedRates
from cbsa_torch.interpret.robustness import Robustness
from cbsa_torch.interpret.structure import AttentionRanks, Sparsity

RATE, NORMALIZED_RATE = "$R^c(Z^\\ell\\,|\\,U^\\ell)$ (nats)", "normalised $R^c$ (nats)"
"""Labels of the two compression terms."""


SCORES = {"val_top1": "accuracy", "val_miou": "mean IoU"}
"""What runs are judged by: the column of ``metrics.jsonl``, and the same for people."""


def score_of(history: Sequence[Mapping[str, Any]]) -> str:
    """The column of the score: the first of ``SCORES`` that a row has."""
    return next((key for key in SCORES if any(key in row for row in history)), "val_top1")


def learning_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and validation score against the epoch; a gap where a value is missing or not finite."""
    figure = Figure(figsize=(7.5, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    _look.curve(left, epochs, series(history, "train_loss"), color=GREY, label="training")
    _look.curve(left, epochs, series(history, "val_loss"), color=BLUE, label="validation")
    left.set(xlabel="epoch", ylabel="loss")
    left.set_ylim(0, 1.05 * left.get_ylim()[1])  # nearly equal losses keep a distance from the top
    _look.legend(left)
    score = score_of(history)
    _look.curve(right, epochs, 100 * series(history, score), color=BLUE)
    right.set(xlabel="epoch", ylabel=f"validation {SCORES[score]} (%)")
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return _look.finish(figure)


def series(history: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """One value of every epoch, NaN where it is missing or not finite: a loss that diverged."""
    values = np.array([np.nan if row.get(key) is None else row[key] for row in history], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


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
        _look.line(axis, layers, mean, color=color)
        axis.set(xlabel="layer", ylabel=label, xticks=layer_ticks(layers))
    return _look.finish(figure)


MECHANISM_LOOK = {
    "cbsa": ("CBSA (8)", BLUE, "-", 2.4),
    "linear_cbsa": ("linear attention (12)", BLUE, "--", 1.2),
    "mhsa": ("MHSA", ORANGE, "-", 1.6),
    "mssa": ("MSSA (9)", ORANGE, "--", 1.2),
    "mlp": ("MLP", GREY, "-", 1.2),
}
"""Label, colour, line and width of those that are drawn: blue is linear in N, orange quadratic."""


def flops_against_tokens(
    tokens: Sequence[int], curves: Mapping[str, Sequence[int]], sizes: Mapping[str, int]
) -> Figure:
    """FLOPs of one layer of each mechanism against the number of tokens (the paper's Fig. 2 and 9)."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for name in sorted(
        MECHANISM_LOOK, key=lambda name: -curves[name][-1]
    ):  # the legend in the order of the lines' ends
        label, color, line, width = MECHANISM_LOOK[name]
        axis.plot(tokens, curves[name], line, color=color, linewidth=width, label=label)
    title = f"one layer, {sizes['dim']} channels, {sizes['num_heads']} heads, 64 representatives"
    axis.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="FLOPs (2 per multiply-add)", title=title)
    axis.title.set_fontsize(9)
    _look.legend(axis)
    return _look.finish(figure)


def attention_panel(
    images: np.ndarray, maps: Sequence[tuple[str, np.ndarray]], titles: Sequence[str] | None = None
) -> Figure:
    """A row per image: the image, then its map at each layer.

    Args:
        images: ``(B, height, width)`` or ``(B, height, width, 3)`` in [0, 1].
        maps: per layer its name and ``(B, rows, columns)``.
        titles: one per image.
    """
    count, columns = len(images), 1 + len(maps)
    figure = Figure(figsize=(1.35 * columns, 1.5 * count), layout="constrained")
    grid = figure.subplots(count, columns, squeeze=False)
    for i, row in enumerate(grid):
        row[0].imshow(images[i], cmap="gray", vmin=0, vmax=1)
        if titles is not None:
            row[0].set_ylabel(_look.legible(titles[i]), fontsize=8, parse_math=False)
        for axis, (name, values) in zip(row[1:], maps, strict=True):
            axis.imshow(values[i], cmap="magma")
            if i == 0:
                axis.set_title(name, fontsize=8)
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    grid[0][0].set_title("image", fontsize=8)
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as an inline SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def to_png(figure: Figure, dpi: int = 200) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def reduced_rates_panel(reduced: ReducedRates, numbers: Sequence[int] | None = None) -> Figure:
    """Rates that CBSA reduces, tokens against representatives (the paper's Fig. 6).

    Above: per layer, the mean over heads and the heads' range; what loses all its rate to the contraction
    (left) and what a step changes a little (right) have scales of their own. Below: every head of every layer,
    for each of the three readings of "after CBSA", with its rank correlation.

    Args:
        reduced: the measurement.
        numbers: of its layers among all of the model, from 1. Default: there are no others.
    """
    figure = Figure(figsize=(9.2, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(1, 1.15))
    layers = _numbers(numbers, reduced.layers)
    curves = (
        (figure.add_subplot(grid[0, :3]), reduced.representatives, ORANGE, "representatives: Q, then C"),
        (figure.axes[0], reduced.output, BLUE, "output: W, then A C"),
        (
            figure.add_subplot(grid[0, 3:]),
            reduced.tokens,
            BLUE,
            "tokens, $\\kappa = 1$: W, then W \N{MINUS SIGN} A C",
        ),
        (figure.axes[1], reduced.tokens_learned, GREY, "tokens, $\\kappa$ learned: W, then W + $\\kappa$ A C"),
    )
    for axis, heads, color, label in curves:
        _look.band(axis, layers, heads, color, label)
    for axis in figure.axes:
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set(xlabel="layer", ylabel="rate reduced (nats)", xticks=layer_ticks(layers))
        axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    panels = (
        (reduced.output, "output", reduced.correlation_output),
        (reduced.tokens, "tokens, $\\kappa = 1$", reduced.correlation),
        (reduced.tokens_learned, "tokens, $\\kappa$ learned", reduced.correlation_learned),
    )
    for column, (ours, title, correlation) in enumerate(panels):
        axis = figure.add_subplot(grid[1, 2 * column : 2 * column + 2])
        rows = zip(ours, reduced.representatives, _look.layer_colors(len(layers)), layers, strict=True)
        for row, across, color, layer in rows:
            axis.scatter(across, row, s=24, color=color, label=f"{layer}", edgecolors="white", linewidths=0.4)
        if column > 0:
            axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set(xlabel="representatives (nats)", ylabel=f"{title} (nats)")
        axis.set_title(f"rank correlation {signed(correlation)}", fontsize=9)
    figure.axes[-1].legend(
        title="layer",
        frameon=False,
        fontsize=7,
        title_fontsize=7,
        ncols=1 if len(layers) <= 8 else 2,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        handletextpad=0.1,
        columnspacing=0.8,
    )
    return _look.finish(figure)


def step_sizes(steps: Sequence[Sequence[float]], numbers: Sequence[int] | None = None) -> Figure:
    """The learned step kappa of every head as a signed heat map: the direction of Eq. 6 is orange.

    The layer adds kappa times the contraction and Eq. 6 subtracts it, so negative values follow Eq. 6.

    Args:
        steps: ``[layer][head]``.
        numbers: as in :func:`reduced_rates_panel`.
    """
    label = "$\\kappa$ (negative: the direction of Eq. 6)"
    return _heat_map(steps, _numbers(numbers, steps), label)


def compressing_heads(reduced: ReducedRates, numbers: Sequence[int] | None = None) -> Figure:
    """Which heads compress the tokens with their learned step (blue), and which decompress (orange)."""
    label = "rate reduced by the layer's step (nats)"
    return _heat_map(reduced.tokens_learned, _numbers(numbers, reduced.layers), label)


def coherence_maps(
    coherence: Mapping[str, Tensor], numbers: Sequence[int] | None = None, columns: int = 6
) -> Figure:
    """Largest cosine between the subspaces of every two heads, a square per layer; 0 is orthogonal."""
    places = _numbers(numbers, coherence)
    count = len(coherence)
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.5 * columns + 0.9, 1.6 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis, values, number in zip(axes, coherence.values(), places, strict=False):
        image = axis.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=1)
        heads = np.arange(len(values))
        axis.set_title(f"layer {number}", fontsize=8)
        axis.set(xticks=heads, yticks=heads)
        shown = [str(h + 1) if len(heads) <= 8 or h % 4 == 3 else "" for h in heads]
        axis.set_xticklabels(shown, fontsize=7)
        axis.set_yticklabels(shown, fontsize=7)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8, aspect=18)
    bar.set_label("largest cosine", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def gap_per_layer(reduced: ReducedRates, numbers: Sequence[int] | None = None) -> Figure:
    """The constraint gap, the tau of Eq. 4, against the layer: mean over heads, with the heads' range."""
    figure = Figure(figsize=(6.4, 2.7), layout="constrained")
    axis, layers = figure.subplots(), _numbers(numbers, reduced.layers)
    _look.band(axis, layers, reduced.gap, BLUE)
    axis.set(xlabel="layer", ylabel="constraint gap (nats)", ylim=(0, None), xticks=layer_ticks(layers))
    return _look.finish(figure)


def ranks_per_layer(ranks: AttentionRanks, numbers: Sequence[int] | None = None) -> Figure:
    """Rank and effective rank of A against the layer: mean over heads, with the heads' range."""
    figure = Figure(figsize=(6.4, 2.9), layout="constrained")
    axis, layers = figure.subplots(), _numbers(numbers, ranks.layers)
    _look.band(axis, layers, ranks.rank, GREY, "numerical rank")
    _look.band(axis, layers, ranks.effective_rank, BLUE, "effective rank")
    axis.set(xlabel="layer", ylabel="rank of A", ylim=(0, None), xticks=layer_ticks(layers))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    _look.legend(axis)
    return _look.finish(figure)


def sparsity_per_layer(sparsity: Sparsity, numbers: Sequence[int] | None = None) -> Figure:
    """Share of exact zeros after each ISTA."""
    figure = Figure(figsize=(6.4, 2.7), layout="constrained")
    axis, layers = figure.subplots(), _numbers(numbers, sparsity.layers)
    axis.bar(layers, [100 * share for share in sparsity.zeros], color=BLUE, width=0.7)
    axis.set(xlabel="layer", ylabel="exact zeros after ISTA (%)", ylim=(0, 100), xticks=layer_ticks(layers))
    _look.finish(figure)
    axis.grid(visible=False, axis="x")
    axis.set_axisbelow(True)
    return figure


def robustness_curve(
    curves: Mapping[str, Robustness], metric: str, colors: Mapping[str, str] | None = None
) -> Figure:
    """A metric against the noise on the parameters: mean over seeds, the seeds' range shaded, each a dot.

    Args:
        curves: name of a model to its measurement; the names make a legend if there are several.
        metric: label of the vertical axis. A dashed line shows it without noise.
        colors: of each name. Default: in the order of the curves.
    """
    # Room for the legend: about 0.16 inches a line.
    figure = Figure(figsize=(6.4, 3.0 + 0.16 * len(curves)), layout="constrained")
    axis = figure.subplots()
    colors = _look.run_colors(curves) if colors is None else colors
    for name, measured in curves.items():
        color = colors[name]
        order = np.argsort(measured.sigmas)
        sigmas, values = np.asarray(measured.sigmas)[order], np.asarray(measured.values)[order]
        axis.fill_between(sigmas, values.min(1), values.max(1), color=color, alpha=0.15, linewidth=0)
        axis.plot(sigmas, values.mean(1), color=color, label=_look.run_label(name))
        axis.plot(sigmas, values, ".", color=color, markersize=4)
        axis.axhline(measured.clean, color=color, linestyle="--", linewidth=0.9)
    positive = [sigma for measured in curves.values() for sigma in measured.sigmas if sigma > 0]
    if positive:  # sigma = 0 keeps its place left of the smallest
        axis.set_xscale("symlog", linthresh=min(positive))
        axis.set_xlim(0 if any(0 in m.sigmas for m in curves.values()) else min(positive) / 1.15, None)
    axis.set_xlabel("standard deviation $\\sigma$ of the noise on attention parameters")
    axis.set_ylabel(metric, parse_math=False)
    if len(curves) > 1:
        _look.runs_legend(axis)
    return _look.finish(figure)


def receptive_field_panel(image: np.ndarray, fields: Sequence[tuple[str, np.ndarray]]) -> Figure:
    """An image, then where each representative looks: a row per layer.

    Args:
        image: ``(height, width[, 3])`` in [0, 1].
        fields: per layer its name and ``(M, rows, columns)``.
    """
    count = max(len(values) for _, values in fields)
    figure = Figure(figsize=(0.62 * (count + 1), 0.8 * len(fields)), layout="constrained")
    grid = figure.subplots(len(fields), count + 1, squeeze=False)
    for row, (name, values) in zip(grid, fields, strict=True):
        row[0].imshow(image, cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(name, fontsize=7, parse_math=False)
        for axis, value in zip(row[1:], values, strict=False):
            axis.imshow(value, cmap="magma")
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    return figure


def _numbers(given: Sequence[int] | None, layers: Collection[Any]) -> list[int]:
    return list(range(1, len(layers) + 1) if given is None else given)


def _as_grid(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """``(layers, heads)``, NaN where a layer has fewer heads and for what is not finite."""
    grid = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for index, row in enumerate(rows):
        grid[index, : len(row)] = row
    return np.where(np.isfinite(grid), grid, np.nan)


def _heat_map(rows: Sequence[Sequence[float]], numbers: Sequence[int], label: str) -> Figure:
    """A cell per layer (across) and head (down) with its value written in it: orange below zero, blue above."""
    grid = _as_grid(rows)
    layers, heads = grid.shape
    most = max(float(np.nan_to_num(np.abs(grid)).max()), 1e-12)
    colors = LinearSegmentedColormap.from_list("signed", [ORANGE, "#f4f4f4", BLUE])
    figure = Figure(figsize=(1.6 + 0.52 * layers, 1.3 + 0.34 * heads), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid.T, cmap=colors, vmin=-most, vmax=most, aspect="auto")
    for (layer, head), value in np.ndenumerate(grid):
        if np.isfinite(value):
            strong = abs(value) > 0.6 * most
            axis.text(
                layer,
                head,
                signed(value, 2 if most < 10 else 0),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if strong else "#333333",
            )
    axis.set(xlabel="layer", ylabel="head", xticks=np.arange(layers), yticks=np.arange(heads))
    axis.set_xticklabels([str(number) for number in numbers])
    axis.set_yticklabels([str(i + 1) for i in range(heads)])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, aspect=14)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure
