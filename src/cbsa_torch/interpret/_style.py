"""What all figures share: colours, ticks of layers, legends, text that matplotlib shows as it is."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.figure import Figure

from cbsa_torch._core.text import readable

BLUE, ORANGE, GREY = "#2563a8", "#c2571a", "#8a8f98"

RUN_COLORS = (
    *(BLUE, ORANGE, GREY, "#3b8f5a", "#7a4fa3", "#b8901d"),
    *("#17a2b0", "#d0569b", "#6b4a34", "#9ac23c"),
)
"""Colours of the runs of a comparison; they repeat if there are more runs."""

LABEL_LENGTH = 30
"""Characters of a run's name in a legend."""

MOST_TICKS = 12
"""Up to so many layers each have a tick on the axis; of more, every second one has."""


def run_colors(names: Iterable[str]) -> dict[str, str]:
    """The colour of each run, to be used in every figure."""
    return {name: RUN_COLORS[i % len(RUN_COLORS)] for i, name in enumerate(names)}


def finish(figure: Figure) -> Figure:
    """Remove the upper and right frame of all axes and draw a light grid."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure


def from_zero(axis: Any) -> None:
    """Let the vertical axis begin at 0 and end a little above the largest value."""
    axis.set_ylim(0, 1.05 * axis.get_ylim()[1])


def legend(axis: Any, **options: Any) -> Any:
    """A legend that shows ``$`` and ``_`` in names as they are, not as a formula."""
    shown = axis.legend(**{"frameon": False, "fontsize": 8, **options})
    for text in shown.get_texts():
        text.set_parse_math(False)
    return shown


def runs_legend(axis: Any) -> None:
    """A legend of runs above the axes; none if no run has a name."""
    labels = axis.get_legend_handles_labels()[1]
    if labels:
        columns = 2 if max(map(len, labels)) <= LABEL_LENGTH // 2 else 1
        legend(axis, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns)


def run_label(name: str) -> str:
    """A run's name for a legend: of a long one the end, which tells paths of run folders apart."""
    shown = legible(name if len(name) <= LABEL_LENGTH else f"…{name[1 - LABEL_LENGTH :]}")
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib hides what begins with an underscore


def legible(text: str) -> str:
    """The text on one line, with a box for every character that the font of figures lacks."""
    known = _characters()
    return "".join(c if ord(c) in known else "\N{WHITE SQUARE}" for c in " ".join(readable(text).split()))


@functools.cache
def _characters() -> frozenset[int]:
    path = font_manager.findfont(font_manager.FontProperties())
    return frozenset(font_manager.get_font(path).get_charmap())


def layer_ticks(numbers: Sequence[int]) -> list[int]:
    """Those of the layers' numbers that get a tick."""
    return sorted(set(numbers))[:: 1 if len(set(numbers)) <= MOST_TICKS else 2]


def band(
    axis: Any, numbers: Sequence[int], heads: Sequence[Sequence[float]], color: Any, label: str = ""
) -> None:
    """A line through the mean over heads, in a band from the smallest head to the largest."""
    low, high = [np.min(row) for row in heads], [np.max(row) for row in heads]
    axis.fill_between(numbers, low, high, color=color, alpha=0.15, linewidth=0)
    line(axis, numbers, [float(np.mean(row)) for row in heads], color=color, label=label)


def line(axis: Any, numbers: Sequence[int], values: Sequence[float], **style: Any) -> None:
    """A dot for each layer, joined by a line."""
    axis.plot(numbers, values, marker="o", markersize=4, **style)


def curve(axis: Any, epochs: Sequence[float], values: np.ndarray, linestyle: str = "-", **style: Any) -> None:
    """A line over epochs; a value without neighbours, which no line shows, is a dot."""
    finite = np.pad(np.isfinite(values), 1)
    lone = np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:])
    dots = {"marker": "o", "markersize": 4, "markevery": lone.tolist()} if len(lone) else {}
    axis.plot(epochs, values, linestyle=linestyle, **dots, **style)


def signed(value: float, digits: int = 2) -> str:
    """A number with a minus sign as long as a plus; "undefined" for NaN."""
    if np.isnan(value):
        return "undefined"
    rounded = round(float(value), digits) + 0.0  # no minus zero
    return f"{rounded:.{digits}f}".replace("-", "\N{MINUS SIGN}")
