import re

import numpy as np
import torch
from matplotlib.figure import Figure

from cbsa_torch.interpret import plots
from cbsa_torch.interpret.pages import embed


def test_figures_are_cut_into_their_panels():
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([1, 2], label="a line")
    image = right.imshow(np.eye(2))
    figure.colorbar(image, ax=right)
    panels = embed.cut(figure, "both", "two panels")
    assert [len(row) for row in panels.rows] == [2]  # the colour bar belongs to its image
    assert panels.color_coded
    widths = [int(width) for width in re.findall(r"width:(\d+)px", "".join(panels.rows[0]))]
    assert all(200 < width < 400 for width in widths)
    assert all(axis.get_visible() for axis in figure.axes)


def test_the_same_figure_gives_the_same_file():
    def line():
        figure = Figure(figsize=(8, 3), layout="constrained")
        figure.subplots().plot([1, 2])
        return embed.cut(figure, "one", "one").rows

    assert line() == line()


def test_empty_places_of_a_grid_are_no_panels():
    """Seven layers fill one row of six, and one place of the second."""
    maps = {str(i): torch.rand(2, 2) for i in range(7)}
    panels = embed.cut(plots.coherence_maps(maps, range(7)), "coherence", "cosines")
    assert sum(map(len, panels.rows)) == 7 + 1  # and the colour bar


def test_many_runs_with_long_names_leave_room_for_the_lines():
    names = [f"/a/folder/with/a/very/long/name/{'x' * 60}/run{i}" for i in range(8)]
    curves = {name: ([1, 2], [3.0, 2.0]) for name in names}
    figure = plots.layer_curves({"rate": curves, "other": curves}, dict.fromkeys(names, "red"))
    embed.cut(figure, "r", "r")
    assert all(axis.get_window_extent().height > 60 for axis in figure.axes)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert all(label.endswith(f"run{i}") and len(label) <= 30 for i, label in enumerate(labels))
