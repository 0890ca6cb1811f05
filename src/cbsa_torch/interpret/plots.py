"""Figures from measurements. Draws only: nothing is computed here."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from cbsa_torch.interpret.rates import LayerRates, ReducedRates
from cbsa_torch.interpret.robustness import Robustness
from cbsa_torch.interpret.structure import AttentionRanks, Sparsity

BLUE, ORANGE, GREY = "#2563a8", "#c2571a", "#8a8f98"


def learning_curves(history: Sequence[dict[str, Any]]) -> Figure:
    """Loss and validation accuracy against the epoch."""
    figure = Figure(figsize=(7.5, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["train_loss"] for row in history], color=GREY, label="training")
    left.plot(epochs, [row["val_loss"] for row in history], color=BLUE, label="validation")
    left.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    right.plot(epochs, [100 * row["val_top1"] for row in history], color=BLUE)
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    return _tidy(figure)


def rates_per_layer(rates: LayerRates) -> Figure:
    """The compression term against the layer, as it is and normalised."""
    figure = Figure(figsize=(7.5, 2.9), layout="constrained")
    axes = figure.subplots(1, 2)
    layers = np.arange(1, len(rates.layers) + 1)
    panels = (
        (axes[0], rates.rate, rates.rate_std, BLUE, "$R^c(Z^\\ell\\,|\\,U^\\ell)$ (nats)"),
        (axes[1], rates.normalized, rates.normalized_std, ORANGE, "normalised $R^c$ (nats)"),
    )
    for axis, mean, std, color, label in panels:
        low, high = np.subtract(mean, std), np.add(mean, std)
        axis.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
        axis.plot(layers, mean, color=color, marker="o", markersize=4)
        axis.set(xlabel="layer", ylabel=label, xticks=layers if len(layers) <= 12 else layers[::2])
    return _tidy(figure)


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
    axis.legend(frameon=False, fontsize=8)
    return _tidy(figure)


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
            row[0].set_ylabel(titles[i], fontsize=8, parse_math=False)
        for axis, (name, values) in zip(row[1:], maps, strict=True):
            axis.imshow(values[i], cmap="magma")
            if i == 0:
                axis.set_title(name, fontsize=8)
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    grid[0][0].set_title("image", fontsize=8)
    return figure


def legend_name(name: str) -> str:
    """A name as a legend shows it: a leading underscore would hide it, dollars would be read as formulas."""
    shown = f" {name}" if name.startswith("_") else name
    return shown.replace("$", r"\$")


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


def to_data_url(figure: Figure) -> str:
    """The figure as a PNG in a ``data:`` URL."""
    return "data:image/png;base64," + base64.b64encode(to_png(figure)).decode()


def _tidy(figure: Figure) -> Figure:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure


def reduced_rates_panel(reduced: ReducedRates) -> Figure:
    """Rates that CBSA reduces, tokens against representatives (the paper's Fig. 6).

    Above: per layer, the mean over heads and the heads' range; what loses all its rate to the contraction
    (left) and what a step changes a little (right) have scales of their own. Below: every head of every layer,
    for each of the three readings of "after CBSA", with its rank correlation.
    """
    figure = Figure(figsize=(9.2, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 6, height_ratios=(1, 1.15))
    layers = np.arange(1, len(reduced.layers) + 1)
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
        low, high = [np.min(row) for row in heads], [np.max(row) for row in heads]
        axis.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
        axis.plot(layers, [np.mean(row) for row in heads], color=color, marker="o", markersize=4, label=label)
    for axis in figure.axes:
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set(xlabel="CBSA layer", ylabel="rate reduced (nats)", xticks=_layer_ticks(len(layers)))
        axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))
    panels = (
        (reduced.output, "output", reduced.correlation_output),
        (reduced.tokens, "tokens, $\\kappa = 1$", reduced.correlation),
        (reduced.tokens_learned, "tokens, $\\kappa$ learned", reduced.correlation_learned),
    )
    for column, (ours, title, correlation) in enumerate(panels):
        axis = figure.add_subplot(grid[1, 2 * column : 2 * column + 2])
        rows = zip(ours, reduced.representatives, _layer_colors(len(layers)), layers, strict=True)
        for row, across, color, layer in rows:
            axis.scatter(across, row, s=24, color=color, label=f"{layer}", edgecolors="white", linewidths=0.4)
        if column > 0:
            axis.axhline(0, color=GREY, linewidth=0.8)
        axis.set(xlabel="representatives (nats)", ylabel=f"{title} (nats)")
        axis.set_title(f"rank correlation {_signed(correlation)}", fontsize=9)
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
    return _tidy(figure)


def step_sizes(reduced: ReducedRates) -> Figure:
    """The learned step kappa of every head as a signed heat map: the direction of Eq. 6 is orange.

    The layer adds kappa times the contraction and Eq. 6 subtracts it, so negative values follow Eq. 6.
    """
    grid = _as_grid(reduced.step_tokens)
    most = max(float(np.nanmax(np.abs(grid))), 1e-12)
    return _heat_map(
        grid,
        colors=LinearSegmentedColormap.from_list("signed", [ORANGE, "#f4f4f4", BLUE]),
        limits=(-most, most),
        label="$\\kappa$ (negative: the direction of Eq. 6)",
    )


def compressing_heads(reduced: ReducedRates) -> Figure:
    """Which heads compress the tokens with their learned step (blue), and which decompress (orange)."""
    grid = _as_grid(reduced.tokens_learned)
    most = max(float(np.nanmax(np.abs(grid))), 1e-12)
    return _heat_map(
        grid,
        colors=LinearSegmentedColormap.from_list("signed", [ORANGE, "#f4f4f4", BLUE]),
        limits=(-most, most),
        label="rate reduced by the layer's step (nats)",
    )


def coherence_maps(coherence: Mapping[str, Tensor], columns: int = 6) -> Figure:
    """Largest cosine between the subspaces of every two heads, a square per layer; 0 is orthogonal."""
    count = len(coherence)
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.5 * columns + 0.9, 1.6 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_visible(False)
    for index, (axis, values) in enumerate(zip(axes, coherence.values(), strict=False)):
        image = axis.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=1)
        heads = np.arange(len(values))
        axis.set_title(f"layer {index + 1}", fontsize=8)
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


def ranks_per_layer(ranks: AttentionRanks) -> Figure:
    """Rank and effective rank of A against the layer: mean over heads, with the heads' range."""
    figure = Figure(figsize=(6.4, 2.9), layout="constrained")
    axis = figure.subplots()
    layers = np.arange(1, len(ranks.layers) + 1)
    for heads, color, label in (
        (ranks.rank, GREY, "numerical rank"),
        (ranks.effective_rank, BLUE, "effective rank"),
    ):
        low, high = [np.min(row) for row in heads], [np.max(row) for row in heads]
        axis.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
        axis.plot(layers, [np.mean(row) for row in heads], color=color, marker="o", markersize=4, label=label)
    axis.set(xlabel="CBSA layer", ylabel="rank of A", ylim=(0, None), xticks=_layer_ticks(len(layers)))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize=8)
    return _tidy(figure)


def sparsity_per_layer(sparsity: Sparsity) -> Figure:
    """Share of exact zeros after each ISTA."""
    figure = Figure(figsize=(6.4, 2.7), layout="constrained")
    axis = figure.subplots()
    layers = np.arange(1, len(sparsity.layers) + 1)
    axis.bar(layers, [100 * share for share in sparsity.zeros], color=BLUE, width=0.7)
    axis.set(xlabel="layer", ylabel="exact zeros after ISTA (%)", ylim=(0, 100))
    axis.set_xticks(_layer_ticks(len(layers)))
    _tidy(figure)
    axis.grid(visible=False, axis="x")
    axis.set_axisbelow(True)
    return figure


def robustness_curve(curves: Mapping[str, Robustness], metric: str) -> Figure:
    """A metric against the noise on the parameters: mean over seeds, the seeds' range shaded, each a dot.

    Args:
        curves: name of a model to its measurement; the names make a legend if there are several.
        metric: label of the vertical axis. A dashed line shows it without noise.
    """
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    colors = [BLUE, ORANGE, GREY, "#3b8f5a", "#7a4fa3", "#b8901d"]
    for index, (name, measured) in enumerate(curves.items()):
        color = colors[index % len(colors)]
        order = np.argsort(measured.sigmas)
        sigmas, values = np.asarray(measured.sigmas)[order], np.asarray(measured.values)[order]
        axis.fill_between(sigmas, values.min(1), values.max(1), color=color, alpha=0.15, linewidth=0)
        axis.plot(sigmas, values.mean(1), color=color, label=legend_name(name))
        axis.plot(sigmas, values, ".", color=color, markersize=4)
        axis.axhline(measured.clean, color=color, linestyle="--", linewidth=0.9)
    positive = [sigma for measured in curves.values() for sigma in measured.sigmas if sigma > 0]
    if positive:  # sigma = 0 keeps its place left of the smallest
        axis.set_xscale("symlog", linthresh=min(positive))
        axis.set_xlim(0 if any(0 in m.sigmas for m in curves.values()) else min(positive) / 1.15, None)
    axis.set(xlabel="standard deviation $\\sigma$ of the noise on attention parameters", ylabel=metric)
    if len(curves) > 1:
        axis.legend(frameon=False, fontsize=8)
    return _tidy(figure)


def _as_grid(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """``(layers, heads)``, NaN where a layer has fewer heads."""
    grid = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for index, row in enumerate(rows):
        grid[index, : len(row)] = row
    return grid


def _heat_map(grid: np.ndarray, *, colors: Any, limits: tuple[float, float], label: str) -> Figure:
    """A cell per layer (across) and head (down), with its value written in it."""
    layers, heads = grid.shape
    figure = Figure(figsize=(1.6 + 0.52 * layers, 1.3 + 0.34 * heads), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(grid.T, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto")
    for (layer, head), value in np.ndenumerate(grid):
        if np.isfinite(value):
            strong = abs(value) > 0.6 * limits[1]
            axis.text(
                layer,
                head,
                _signed(value, 2 if limits[1] < 10 else 0),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if strong else "#333333",
            )
    axis.set(xlabel="CBSA layer", ylabel="head", xticks=np.arange(layers), yticks=np.arange(heads))
    axis.set_xticklabels([str(i + 1) for i in range(layers)])
    axis.set_yticklabels([str(i + 1) for i in range(heads)])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, aspect=14)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _signed(value: float, digits: int = 2) -> str:
    return "undefined" if np.isnan(value) else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _layer_ticks(count: int) -> np.ndarray:
    return np.arange(1, count + 1, 1 if count <= 12 else 2)


def _layer_colors(count: int) -> list[Any]:
    """From early (light) to late (dark)."""
    return [colormaps["viridis_r"](0.2 + 0.8 * i / max(count - 1, 1)) for i in range(count)]
