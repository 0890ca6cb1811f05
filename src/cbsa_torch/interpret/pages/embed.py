"""Figures and images inside a page: SVG panels that fit a phone, data URLs; and whole figures as files."""

from __future__ import annotations

import base64
import html
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from cbsa_torch._core.files import write_atomically
from cbsa_torch._core.text import readable
from cbsa_torch.interpret import plots

CSS_PIXELS = 96
"""Per inch."""

SINGLE_WIDTH = 4.8
"""Inches: a figure of one panel gets no wider, so that its text stays readable on a phone."""


class Panels(NamedTuple):
    """A figure as it goes on a page."""

    rows: list[list[str]]
    """Inline SVG elements; a row of them wraps where it does not fit."""
    color_coded: bool
    """Whether colours stand for values, so that a dark page must not change them."""


def cut(figure: Figure, name: str, label: str) -> Panels:
    """Cut a figure into SVG panels, one per axes (with its colour bar) or legend of the figure.

    Args:
        figure: its layout is computed here and fixed.
        name: a prefix of the ids within, unique on the page.
        label: the text alternative, for screen readers.
    """
    groups = _panel_artists(figure)
    width, height = figure.get_size_inches()
    if len(groups) == 1 and width > SINGLE_WIDTH:
        figure.set_size_inches(SINGLE_WIDTH, height)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    boxes = [Bbox.union([artist.get_tightbbox() for artist in group]) for group in groups]
    rows = [_row(group[0]) for group in groups]
    everything = [artist for group in groups for artist in group]
    panels: dict[tuple[int, ...] | None, list[str]] = {}
    for i, (group, row) in enumerate(zip(groups, rows, strict=True)):
        # Panels of one row are cut to one height, so that their axes line up.
        level = [box for box, other in zip(boxes, rows, strict=True) if other == row]
        box = Bbox.from_extents(
            boxes[i].x0, min(b.y0 for b in level), boxes[i].x1, max(b.y1 for b in level)
        ).padded(4)
        for artist in everything:
            artist.set_visible(artist in group)
        inches = box.transformed(figure.dpi_scale_trans.inverted())
        svg = plots.to_svg(figure, f"{name}-{i}", bbox_inches=inches, pad_inches=0, transparent=True)
        panel = _inline(svg, f"{name}-{i}", label)
        # What has no row (a shared colour bar, a legend) stands at the end of the last.
        panels.setdefault(row if row is not None or not panels else [*panels][-1], []).append(panel)
    for artist in everything:
        artist.set_visible(True)
    meshes = (isinstance(item, QuadMesh) for axis in figure.axes for item in axis.collections)
    return Panels(list(panels.values()), any(axis.images for axis in figure.axes) or any(meshes))


def _panel_artists(figure: Figure) -> list[list[Any]]:
    bars: dict[Any, Any] = {}
    for axis in figure.axes:
        for item in (*axis.images, *axis.collections):
            if item.colorbar is not None:
                bars[item.colorbar.ax] = axis
    # Colour bars of several axes come last and stand for themselves.
    shared = {bar for bar in bars if len(getattr(bar, "_colorbar_info", {}).get("parents", ())) > 1}
    groups = [
        [axis, *(bar for bar, owner in bars.items() if owner is axis and bar not in shared)]
        for axis in figure.axes
        if axis not in bars and axis.get_visible()  # cells of a grid may be left empty
    ]
    return [*groups, *([bar] for bar in shared), *([legend] for legend in figure.legends)]


def _row(artist: Any) -> tuple[int, ...] | None:
    """The rows of the figure's grid that axes span; None for what is not placed in a grid."""
    place = artist.get_subplotspec() if hasattr(artist, "get_subplotspec") else None
    return None if place is None else tuple(place.rowspan)


def _inline(svg: str, prefix: str, label: str) -> str:
    """Make ids unique on the page, and give the width in CSS pixels in place of points."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="|href="#|url\(#', rf"\g<0>{prefix}-", svg)
    points = re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)
    assert points is not None, "matplotlib writes the width in points"
    width = float(points.group(1)) * CSS_PIXELS / 72
    head, _, rest = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(readable(label))}" style="width:{width:.0f}px">{rest}'


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write the whole figure as PNG and SVG."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    # Laid out once: each file would do it again.
    engine = figure.get_layout_engine()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    write_atomically(paths[0], plots.to_png(figure, dpi=150))
    write_atomically(paths[1], plots.to_svg(figure, name).encode())
    figure.set_layout_engine(engine)
    return paths


def image_url(image: np.ndarray) -> str:
    """``(height, width[, 3])`` values in [0, 1] as a PNG in a ``data:`` URL, pixel for pixel."""
    buffer = io.BytesIO()
    image = np.clip(image, 0, 1)
    rgb = np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image
    matplotlib.image.imsave(buffer, np.ascontiguousarray(rgb), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def png_url(figure: Figure, dpi: int = 150) -> str:
    """A whole figure as a PNG in a ``data:`` URL."""
    return "data:image/png;base64," + base64.b64encode(plots.to_png(figure, dpi)).decode()


def colors(name: str = "magma") -> str:
    """256 colours of a colour map as base64 of RGB bytes."""
    table = matplotlib.colormaps[name](np.arange(256))[:, :3]
    return base64.b64encode(np.round(255 * table).astype(np.uint8).tobytes()).decode()
