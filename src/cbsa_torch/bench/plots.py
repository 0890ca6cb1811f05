"""Time, memory and FLOPs of layers against the number of tokens, log-log, and the speed of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cbsa_torch._core.optional import require

require("interpret")

from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import (  # noqa: E402
    FixedLocator,
    LogLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
    StrMethodFormatter,
)

from cbsa_torch.bench.layers import LOWER_BOUND, NAIVE, Row  # noqa: E402
from cbsa_torch.bench.models import ModelRow  # noqa: E402

BLUE, ORANGE, GREY = "#2563a8", "#c2571a", "#8a8f98"
LOOK = {
    LOWER_BOUND: ("lower bound: projections, extraction", "black", ":", 1.4),
    "cbsa tiled": ("CBSA", BLUE, "-", 2.4),
    "cbsa triton": ("CBSA, Triton", "#13294b", "-", 2.4),
    "cbsa tiled, recompute": ("CBSA, recompute", BLUE, "--", 1.2),
    "cbsa eager": ("CBSA, eager", "#7aa6d8", "-", 1.4),
    NAIVE: ("CBSA, naive", "#7aa6d8", "--", 1.2),
    "cbsa certified": ("CBSA, certified", "#13294b", "--", 1.2),
    "agent": ("agent", "#3d8f5f", "-", 1.2),
    "tssa": ("TSSA", "#3d8f5f", "--", 1.2),
    "mhsa": ("softmax attention (SDPA)", ORANGE, "-", 1.6),
    "mssa": ("MSSA (SDPA)", ORANGE, "--", 1.2),
}
"""Label, colour, line and width: blue is CBSA, green linear, orange quadratic.

``"auto"`` is left out: it is one of the other implementations."""


MODEL_COLORS = {
    "naive_cbt": "#7aa6d8",
    "cbt": BLUE,
    "vit": ORANGE,
    "nystrom_vit": "#e3a17a",
    "crate": "#8d5fa8",
    "tost": "#3d8f5f",
    "agent": "#9bb83d",
}
"""By the beginning of a name; other models are grey."""
MODEL_LINES = {"": "-", "fused": "--", "compiled": ":", "fused compiled": "-."}


def of_models(rows: Sequence[ModelRow], title: str) -> Figure:
    """Images per second against image size, inference and training step, a line for each model.

    Of several batches of one image size, the first that was measured.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    sides = sorted({row.image_size for row in rows})
    for axis, training in zip(axes, (False, True), strict=True):
        lines: dict[str, dict[int, float]] = {}
        for row in rows:
            if row.training == training:
                lines.setdefault(row.name, {}).setdefault(row.image_size, row.images_per_second)
        for label, rates in lines.items():
            name, _, variant = label.partition(" ")
            colors = [color for family, color in MODEL_COLORS.items() if name.startswith(f"{family}_")]
            style = {"color": (colors or [GREY])[0], "linestyle": MODEL_LINES[variant]}
            points = sorted(rates.items())
            axis.plot(*zip(*points, strict=True), label=label, marker="o", markersize=2.5, **style)
        axis.set(xscale="log", yscale="log", xlabel="side of the image, pixels")
        axis.set_title("training step" if training else "inference", fontsize=10)
        axis.xaxis.set_major_locator(FixedLocator(sides))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axis.tick_params(axis="y", which="both", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6, which="both")
    axes[0].set_ylabel("images / s")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", frameon=False, fontsize=8, handlelength=4, ncols=3
    )
    figure.suptitle(title, fontsize=10)
    return figure


def against_tokens(rows: Sequence[Row], title: str) -> Figure:
    """Time and peak memory per token, inference and training step; flat is linear."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    for column, training in zip(grid.T, (False, True), strict=True):
        for name, (label, color, line, width) in LOOK.items():
            own = sorted((r for r in rows if r.name == name and r.training == training), key=lambda r: r.tokens)
            if not own:
                continue
            tokens = [r.tokens for r in own]
            style = {"color": color, "linestyle": line, "linewidth": width, "marker": "o", "markersize": 2.5}
            microseconds = [1e3 * r.milliseconds / (r.batch * r.tokens) for r in own]
            column[0].plot(tokens, microseconds, label=label, **style)
            measured = [r for r in own if r.peak is not None]
            column[1].plot([r.tokens for r in measured], [r.peak for r in measured], **style)
        column[0].set_title("training step" if training else "inference", fontsize=10)
        column[1].set(xlabel="tokens N")
        for axis in column:
            axis.set(xscale="log", yscale="log")
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25, linewidth=0.6, which="both")
    grid[0][0].set_ylabel("µs per token")
    grid[1][0].set_ylabel("peak memory / input")
    handles, labels = grid[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=8, ncols=4)
    for axis in grid[1]:
        axis.yaxis.set_major_locator(FixedLocator([2, 3, 4, 6, 8, 10]))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
    figure.suptitle(title, fontsize=10)
    return figure


MECHANISM_STYLES = {
    "cbsa": ("CBSA (8)", BLUE, "-", 2.4),
    "linear_cbsa": ("linear attention (12)", BLUE, "--", 1.2),
    "mhsa": ("MHSA", ORANGE, "-", 1.6),
    "mssa": ("MSSA (9)", ORANGE, "--", 1.2),
    "mlp": ("MLP", GREY, "-", 1.2),
}
"""Label, colour, line and width of every curve: blue is linear in N, orange quadratic."""


def flops_against_tokens(
    tokens: Sequence[int], curves: Mapping[str, Sequence[int]], sizes: Mapping[str, int]
) -> Figure:
    """FLOPs of one layer of each mechanism against the number of tokens (the paper's Fig. 2 and 9).

    Args:
        tokens: numbers of tokens N.
        curves: name of each of :data:`MECHANISM_STYLES` to its FLOPs at every N.
        sizes: ``dim`` and ``num_heads`` of the layer, for the title.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    # The legend is in the order in which the lines end.
    for name in sorted(MECHANISM_STYLES, key=lambda name: -curves[name][-1]):
        label, color, line, width = MECHANISM_STYLES[name]
        axis.plot(tokens, curves[name], line, color=color, linewidth=width, label=label)
    title = f"one layer, {sizes['dim']} channels, {sizes['num_heads']} heads, 64 representatives"
    axis.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="FLOPs (2 per multiply-add)", title=title)
    axis.title.set_fontsize(9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.legend(frameon=False, fontsize=8)
    return figure
