"""Several models on one page: the same measures of each, on the same images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor, nn

from cbsa_torch._core.checks import check_positive_int
from cbsa_torch.interpret import figures, plots
from cbsa_torch.interpret.report import page
from cbsa_torch.interpret.report.build import ReportFiles, choose_pictures, left_out, said
from cbsa_torch.interpret.report.maps import Maps, Pictures, measure_maps
from cbsa_torch.interpret.report.measure import Measures, as_numbers, measure


class ComparedRun(NamedTuple):
    """A model with what it is fed and what is known of it."""

    name: str
    """What the page calls it; no two the same."""
    model: nn.Module
    """In eval mode, with mixers of ours or timm's attention."""
    inputs: Tensor
    """``(B, C, height, width)``; the same images for all models, each at its own size."""
    images: np.ndarray
    """``(B, height, width[, 3])`` the same in [0, 1]."""
    labels: Sequence[int] | None
    kind: str
    """The model's own name."""
    parameters: int
    flops: int
    """For one image, two per multiply-add."""
    accuracy: float | None
    image_titles: Sequence[str] | None = None


class _Looked(NamedTuple):
    run: ComparedRun
    measures: Measures
    maps: Maps
    pictures: Pictures


def compare(
    runs: Sequence[ComparedRun],
    folder: str | Path,
    *,
    title: str,
    shown: int = 4,
    batch_size: int = 64,
    robustness_images: int = 128,
) -> ReportFiles:
    """Write ``compare.html``, ``compare.json`` and ``figures/`` into ``folder``.

    Args:
        runs: two models or more.
        title: heading of the page.
        shown: how many images get attention maps.
        batch_size: images per forward pass.
        robustness_images: how many of the images (the first) the robustness curves use; 0 leaves them out.

    Raises:
        ValueError: fewer than two runs, two of one name, different numbers of images.
    """
    check_positive_int("shown", shown)
    check_positive_int("batch_size", batch_size)
    names = [run.name for run in runs]
    if len(runs) < 2 or len(set(names)) < len(names):
        raise ValueError(f"runs must be two or more with different names, got {names}")
    sizes = {len(run.inputs) for run in runs}
    if len(sizes) > 1:
        raise ValueError(f"runs must have the same images, got {sorted(sizes)} inputs")
    looked = [_look(run, shown, batch_size, robustness_images) for run in runs]

    drawn: dict[str, Figure] = {
        "coding_rate": figures.rates_of_runs({item.run.name: item.measures.rates for item in looked})
    }
    robust = {
        item.run.name: item.measures.robustness for item in looked if item.measures.robustness is not None
    }
    if robust:
        drawn["robustness"] = plots.robustness_curve(robust, looked[0].measures.robustness_metric)
    folder = Path(folder)
    written = page.save_all(drawn, folder / "figures")
    sections = []
    for number, item in enumerate(looked):
        section, files = _section(item, number, folder / "figures")
        sections.append(section)
        written += files
    text = page.render(
        "compare.html.j2",
        title=title,
        runs=sections,
        images=len(runs[0].inputs),
        robustness_images=looked[0].measures.robustness_images,
        robustness_metric=looked[0].measures.robustness_metric,
        figures=dict.fromkeys(page.LABELS)
        | {name: figures.draw(figure, name, page.LABELS[name]) for name, figure in drawn.items()},
        has_maps=any(section["maps"] for section in sections),
    )
    out = ReportFiles(folder / "compare.html", folder / "compare.json", written)
    out.page.write_text(text, encoding="utf-8")
    numbers = {"title": title, "runs": [_numbers(item) for item in looked]}
    out.numbers.write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    return out


def _look(run: ComparedRun, shown: int, batch_size: int, robustness_images: int) -> _Looked:
    pictures = choose_pictures(run.inputs, run.images, run.image_titles, shown=shown)
    measures = measure(
        run.model,
        run.inputs,
        labels=run.labels,
        batch_size=batch_size,
        robustness_images=robustness_images,
    )
    return _Looked(run, measures, measure_maps(run.model, pictures), pictures)


def _section(item: _Looked, number: int, folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """One run's row of the table and its own figures."""
    panels = page.map_figures(item.maps, item.pictures)
    reduced = item.measures.reduced
    own = {} if reduced is None else {"reduced_rates": plots.reduced_rates_panel(reduced)}
    written = page.save_all(
        {f"{name}_{number + 1}": figure for name, figure in {**own, **panels}.items()}, folder
    )
    section = {
        "run": item.run,
        "color": figures.run_color(number),
        "measures": item.measures,
        "said": said(item.measures),
        "reduced": None
        if reduced is None
        else figures.draw(own["reduced_rates"], f"reduced-{number}", page.LABELS["reduced_rates"]),
        "maps": page.map_section(item.maps, item.pictures, panels),
        "left_out": left_out(item.measures, item.maps),
    }
    return section, written


def _numbers(item: _Looked) -> dict[str, Any]:
    run = item.run
    return {
        "name": run.name,
        "model": run.kind,
        "parameters": run.parameters,
        "flops": run.flops,
        "accuracy": run.accuracy,
        **as_numbers(item.measures),
        "statements": said(item.measures),
        "maps": {"layers": [layer.name for layer in item.maps.layers], "missing": item.maps.missing},
    }
