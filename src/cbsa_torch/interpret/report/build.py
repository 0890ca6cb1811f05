"""Arrange measurements and figures on one page; the numbers also go to a JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cbsa_torch._core.checks import check_positive_int
from cbsa_torch._core.files import write_atomically
from cbsa_torch.interpret import figures, plots
from cbsa_torch.interpret.report import page
from cbsa_torch.interpret.report.maps import Pictures, measure_maps
from cbsa_torch.interpret.report.measure import as_numbers, measure
from cbsa_torch.interpret.report.numbers import dump


class ReportFiles(NamedTuple):
    """What was written."""

    page: Path
    numbers: Path
    figures: list[Path]


def report(
    model: nn.Module,
    inputs: Tensor,
    images: np.ndarray,
    folder: str | Path,
    *,
    title: str,
    facts: Mapping[str, str],
    history: Sequence[dict[str, Any]] = (),
    evaluation: Mapping[str, Any] | None = None,
    image_titles: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    further: Pictures | None = None,
    shown: int = 6,
    batch_size: int = 64,
    robustness_images: int = 128,
) -> ReportFiles:
    """Write ``report.html``, ``report.json`` and ``figures/`` into ``folder``.

    The page is one file that needs nothing else. A measure that does not exist for the model is left out, and
    the page says why. Figures of an earlier report in ``folder`` that this one does not have are removed.

    Args:
        model: a trained model in eval mode, with mixers of ours or timm's attention.
        inputs: ``(B, C, height, width)`` what the model is fed; all of them measure the rates.
        images: the same images to look at, ``(B, height, width[, 3])`` in [0, 1].
        title: heading of the page.
        facts: the model card, name to value.
        history: one row per epoch with epoch, train_loss, val_loss and val_top1 or val_miou; NaN and None
            leave gaps.
        evaluation: top1 or miou, loss, images, confusion, class_names, split of a test.
        image_titles: captions of the images.
        labels: their classes, for the robustness curve. Without them it shows how many predictions stay the
            same.
        further: images that get attention maps before those of ``images``, but measure nothing.
        shown: how many of ``images`` get attention maps.
        batch_size: images per forward pass.
        robustness_images: how many of the images (the first) the robustness curve uses; 0 leaves it out.

    Raises:
        ValueError: numbers of images, labels or titles that do not fit; a model with nothing to capture.
    """
    check_counts(shown, batch_size, robustness_images)
    pictures = choose_pictures(inputs, images, image_titles, further, shown)
    folder = Path(folder)
    measures = measure(model, inputs, labels=labels, batch_size=batch_size, robustness_images=robustness_images)
    maps = measure_maps(model, pictures)
    drawn = page.measure_figures(measures)
    if history:
        drawn = {"learning_curves": plots.learning_curves(history), **drawn}
    panels = page.map_figures(maps, pictures)
    written = page.save_all({**drawn, **panels}, folder / "figures")
    section = page.map_section(maps, pictures, panels)
    text = page.render(
        "report.html.j2",
        title=title,
        facts=facts,
        evaluation=evaluation,
        score="miou" if evaluation and "miou" in evaluation else "top1",
        score_title=plots.SCORES[plots.score_of(history)],
        best=_best(history),
        measures=measures,
        places=page.numbers(measures),
        said=page.said(measures),
        figures=dict.fromkeys(page.LABELS)
        | {name: figures.draw(figure, name, page.LABELS[name]) for name, figure in drawn.items()},
        maps=section,
        has_maps=section is not None,
        left_out=page.left_out(measures, maps, history),
    )
    files = ReportFiles(folder / "report.html", folder / "report.json", written)
    numbers = {
        "title": title,
        "facts": dict(facts),
        "history": list(history),
        "evaluation": evaluation,
        **as_numbers(measures),
        "statements": page.said(measures),
        "maps": {"layers": [layer.name for layer in maps.layers], "missing": maps.missing},
    }
    write_atomically(files.page, text.encode())
    write_atomically(files.numbers, dump(numbers).encode())
    page.remove_stale(folder / "figures", written)
    return files


def choose_pictures(
    inputs: Tensor,
    images: np.ndarray,
    titles: Sequence[str] | None,
    further: Pictures | None = None,
    shown: int = 6,
) -> Pictures:
    """The images that get maps: ``further``, then the first ``shown``."""
    if len(images) != len(inputs):
        raise ValueError(f"images must be those of inputs: got {len(images)} images and {len(inputs)} inputs")
    shown = min(shown, len(images))
    if titles is not None and len(titles) < shown:
        raise ValueError(f"image_titles must be at least {shown}, got {len(titles)}")
    names = [f"image {i + 1}" for i in range(shown)] if titles is None else list(titles[:shown])
    if further is None:
        return Pictures(inputs[:shown], images[:shown], names)
    return Pictures(
        torch.cat([further.inputs, inputs[:shown]]),
        np.concatenate([further.images, images[:shown]]),
        [*further.titles, *names],
    )


def check_counts(shown: int, batch_size: int, robustness_images: int) -> None:
    """Raise for a number of images that cannot be."""
    check_positive_int("shown", shown)
    check_positive_int("batch_size", batch_size)
    if isinstance(robustness_images, bool) or not isinstance(robustness_images, int):
        raise TypeError(f"robustness_images must be an int, got {robustness_images!r}")
    if robustness_images < 0:
        raise ValueError(f"robustness_images must be at least 0, got {robustness_images}")


def _best(history: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    """The epoch of the highest validation score, and that; None if there is none."""
    key = plots.score_of(history)
    known = [row for row in history if row.get(key) is not None and math.isfinite(row[key])]
    best = max(known, key=lambda row: row[key], default=None)
    return None if best is None else (best["epoch"], best[key])
