"""Curves of several runs on one axis. Draws only; a run has the same colour in every figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cbsa_torch.interpret import _look
from cbsa_torch.interpret.plots import series


class Curve(NamedTuple):
    """A value per layer."""

    numbers: Sequence[int]
    """Of the layers, from 1."""
    values: Sequence[float]


def learning_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], colors: Mapping[str, str]) -> Figure:
    """Loss and validation accuracy of runs against the epoch; the training loss is dotted.

    Args:
        histories: name of a run to its rows, as :func:`cbsa_torch.interpret.plots.learning_curves` takes them.
        colors: of each name.
    """
    figure, (left, right) = _figure(2, len(histories))
    for name, history in histories.items():
        epochs, color = [row["epoch"] for row in history], colors[name]
        _look.curve(left, epochs, series(history, "train_loss"), ":", color=color, linewidth=1.1)
        _look.curve(left, epochs, series(history, "val_loss"), color=color, label=_look.run_label(name))
        _look.curve(right, epochs, 100 * series(history, "val_top1"), color=color)
    left.set(xlabel="epoch", ylabel="loss (dotted: training)")
    left.set_ylim(0, 1.05 * left.get_ylim()[1])  # nearly equal losses keep a distance from the top
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _look.runs_legend(left)
    return _look.finish(figure)


def layer_curves(
    panels: Mapping[str, Mapping[str, Curve]], colors: Mapping[str, str], *, from_zero: bool = False
) -> Figure:
    """Values of runs against the layer, a panel for each kind of value.

    Args:
        panels: label of a vertical axis to the curves of runs, name to curve.
        colors: of each name.
        from_zero: vertical axes begin at 0.
    """
    most = max(len(curves) for curves in panels.values())
    figure, axes = _figure(len(panels), most)
    for axis, (label, curves) in zip(axes, panels.items(), strict=True):
        for name, curve in curves.items():
            _look.line(axis, curve.numbers, curve.values, color=colors[name], label=_look.run_label(name))
        ticks = _look.layer_ticks([number for curve in curves.values() for number in curve.numbers])
        axis.set(xlabel="layer", ylabel=label, xticks=ticks)
        if from_zero:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])  # dots of nearly equal values keep a distance
    _look.runs_legend(axes[0])
    return _look.finish(figure)


def _figure(panels: int, runs: int) -> tuple[Figure, Any]:
    # Room for the legend: about 0.16 inches a line.
    figure = Figure(figsize=(7.5 if panels > 1 else 6.4, 2.8 + 0.16 * runs), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]
