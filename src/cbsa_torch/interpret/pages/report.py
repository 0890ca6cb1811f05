"""One model on one page; the numbers also go to a JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cbsa_torch.interpret import plots
from cbsa_torch.interpret.pages import render
from cbsa_torch.interpret.pages.maps import MOST_PICTURES, Pictures, measure_maps
from cbsa_torch.interpret.pages.measures import measure_model
from cbsa_torch.interpret.pages.render import PageFiles
from cbsa_torch.interpret.pages.sentences import sentences


def report(
    model: nn.Module,
    images: Tensor,
    folder: str | Path,
    *,
    title: str | None = None,
    facts: Mapping[str, str] | None = None,
    pictures: Pictures | None = None,
    labels: Sequence[int] | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    evaluation: Mapping[str, Any] | None = None,
    score: str = "val_top1",
    score_title: str = "accuracy",
    batch_size: int = 64,
    robustness_images: int = 128,
) -> PageFiles:
    """Write ``report.html``, ``report.json`` and ``figures/`` into ``folder``.

    The page is one file that needs nothing else. A measure that does not exist for the model is left out, and
    the page says why. Figures of an earlier report in ``folder`` that this one does not have are removed.

    Args:
        model: a trained model in eval mode, with mixers of this library or timm's attention.
        images: ``(B, C, height, width)`` what the model is fed. All of them measure the rates.
        folder: where to write; made if it does not exist.
        title: heading of the page. Default: the model's class.
        facts: a table about the model, name to value. Default: its class and number of parameters.
        pictures: the images whose attention maps are shown, which need not be among ``images``. Default: the
            first six of ``images``, each scaled to [0, 1]. :meth:`Pictures.of` undoes a normalisation and takes
            captions.
        labels: B class indices, for the robustness curve. Without them it shows how many predictions stay the
            same.
        history: one row per epoch with epoch, train_loss, val_loss and the validation score; NaN and None
            leave gaps.
        evaluation: of a test: score (a share of 1), loss, images (their number), split, and, if known,
            confusion and class_names.
        score: key of the validation score in the rows of ``history``.
        score_title: what the score of ``history`` and ``evaluation`` is called.
        batch_size: images per forward pass.
        robustness_images: how many of ``images`` (the first) the robustness curve uses; 0 leaves it out.

    Returns:
        The paths of page, numbers and figures.

    Raises:
        ValueError: a model without layers to capture, labels or pictures that do not fit, images that cannot
            be shown while ``pictures`` is not given, a batch size below 1 or a negative number of images.
        TypeError: numbers of images that are not ints.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import report
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> files = report(model, torch.rand(8, 1, 8, 8), "page", robustness_images=0)
        >>> files.page.name
        'report.html'
    """
    title = type(model).__name__ if title is None else title
    pictures = Pictures.of(images[:MOST_PICTURES]) if pictures is None else pictures
    if facts is None:
        facts = {"model": type(model).__name__, "parameters": f"{sum(p.numel() for p in model.parameters()):,}"}
    measures = measure_model(
        model, images, labels=labels, batch_size=batch_size, robustness_images=robustness_images
    )
    maps = measure_maps(model, pictures)
    found = sentences(measures)
    figures = render.measure_figures(measures)
    if history:
        curves = plots.learning_curves({"": history}, score=score, score_title=score_title)
        figures = {"learning_curves": curves, **figures}
    of_maps = render.map_figures(maps, pictures)
    folder = Path(folder)
    files = PageFiles(
        folder / "report.html",
        folder / "report.json",
        render.save_figures({**figures, **of_maps}, folder),  # before the panels, which are laid out anew
    )
    page = render.fill(
        "report.html.j2",
        title=title,
        facts=facts,
        evaluation=evaluation,
        score_title=score_title,
        best=best_epoch(history, score),
        measures=measures,
        cbsa_layers=render.layer_numbers(measures, measures.reduced.layers) if measures.reduced else [],
        sentences=found,
        figures=render.panels(figures),
        maps=render.map_section(maps, pictures, of_maps),
        has_maps=bool(maps.layers),
        left_out=render.left_out(measures, maps, history),
    )
    numbers = {
        "title": title,
        "facts": dict(facts),
        "history": list(history),
        "evaluation": evaluation,
        **render.numbers_of(measures, found, maps),
    }
    return render.write_page(files, page, numbers)


def best_epoch(history: Sequence[Mapping[str, Any]], score: str) -> tuple[int, float] | None:
    """The epoch of the highest validation score, of equal ones that with the smallest loss, and that score."""
    known = [row for row in history if row.get(score) is not None and math.isfinite(row[score])]
    best = max(known, key=lambda row: (row[score], -row.get("val_loss", math.inf)), default=None)
    return None if best is None else (best["epoch"], best[score])
