"""Figures from measurements. Draws only: nothing is computed here."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cbsa_torch.interpret.rates import LayerRates

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
            row[0].set_ylabel(titles[i], fontsize=8)
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


def to_data_url(figure: Figure) -> str:
    """The figure as a PNG in a ``data:`` URL."""
    return "data:image/png;base64," + base64.b64encode(to_png(figure)).decode()


def _tidy(figure: Figure) -> Figure:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure
