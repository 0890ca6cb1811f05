"""Several models on one page: the same measures of each, on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cbsa_torch._core.files import write_atomically
from cbsa_torch.interpret import _look, figures
from cbsa_torch.interpret.report import page
from cbsa_torch.interpret.report.build import ReportFiles, check_counts, choose_pictures
from cbsa_torch.interpret.report.maps import measure_maps
from cbsa_torch.interpret.report.measure import as_numbers, measure
from cbsa_torch.interpret.report.numbers import dump
from cbsa_torch.interpret.report.side_by_side import OWN, ComparedRun, Looked, overlaid, own_figures, table

PREFIX = "compare_"
"""Of the figures' files: a folder may hold a report, too."""


def compare(
    runs: Sequence[ComparedRun],
    folder: str | Path,
    *,
    title: str,
    shown: int = 4,
    batch_size: int = 64,
    robustness_images: int = 128,
) -> ReportFiles:
    """Write ``compare.html``, ``compare.json`` and ``figures/compare_*`` into ``folder``.

    What a report shows of one model is here shown of all: curves on one axis where they fit it, else side by
    side. A run has one colour everywhere. Figures of an earlier comparison in ``folder`` are replaced.

    Args:
        runs: two models or more.
        title: heading of the page.
        shown: how many images get attention maps.
        batch_size: images per forward pass.
        robustness_images: how many of the images (the first) the robustness curves use; 0 leaves them out.

    Raises:
        ValueError: fewer than two runs, two of one name, different numbers of images, labels of some runs only
            or different ones; a negative number of images.
    """
    check_counts(shown, batch_size, robustness_images)
    _check_runs(runs)
    colors = _look.run_colors(run.name for run in runs)
    looked = [_look_into(run, shown, batch_size, robustness_images) for run in runs]
    folder = Path(folder)
    drawn = overlaid(looked, colors)
    written = page.save_all({f"{PREFIX}{name}": figure for name, figure in drawn.items()}, folder / "figures")
    sections = []
    for number, item in enumerate(looked, 1):
        own = own_figures(item)
        panels = page.map_figures(item.maps, item.pictures)
        files = {f"{PREFIX}{name}_{number}": figure for name, figure in {**own, **panels}.items()}
        written += page.save_all(files, folder / "figures")
        sections.append(
            {
                "run": item.run,
                "color": colors[item.run.name],
                "measures": item.measures,
                "said": page.said(item.measures),
                "figures": dict.fromkeys(OWN)
                | {
                    name: figures.draw(figure, f"{name}-{number}", f"{page.LABELS[name]}: {item.run.name}")
                    for name, figure in own.items()
                },
                "maps": page.map_section(item.maps, item.pictures, panels),
                "left_out": page.left_out(item.measures, item.maps, item.run.history),
            }
        )
    text = page.render(
        "compare.html.j2",
        title=title,
        runs=sections,
        table=table(looked),
        images=len(runs[0].inputs),
        robustness_images=looked[0].measures.robustness_images,
        robustness_metric=looked[0].measures.robustness_metric,
        figures=dict.fromkeys(page.LABELS)
        | {name: figures.draw(figure, name, page.LABELS[name]) for name, figure in drawn.items()},
        has_maps=any(section["maps"] for section in sections),
    )
    out = ReportFiles(folder / "compare.html", folder / "compare.json", written)
    write_atomically(out.page, text.encode())
    write_atomically(out.numbers, dump({"title": title, "runs": [_numbers(item) for item in looked]}).encode())
    page.remove_stale(folder / "figures", written, PREFIX)
    return out


def _check_runs(runs: Sequence[ComparedRun]) -> None:
    """Refuse runs that cannot stand side by side."""
    names = [run.name for run in runs]
    if len(runs) < 2 or len(set(names)) < len(names):
        raise ValueError(f"runs must be two or more with different names, got {names}")
    sizes = {len(run.inputs) for run in runs}
    if len(sizes) > 1:
        raise ValueError(f"runs must have the same images, got {sorted(sizes)} inputs")
    without = [run.name for run in runs if run.labels is None]
    if 0 < len(without) < len(runs):
        raise ValueError(f"runs must all have labels or none, for one axis of robustness: {without} have none")
    first = runs[0]
    for run in runs[1:]:
        if run.labels is not None and first.labels is not None and list(run.labels) != list(first.labels):
            raise ValueError(f"runs must have the same labels: those of {first.name} and {run.name} differ")


def _look_into(run: ComparedRun, shown: int, batch_size: int, robustness_images: int) -> Looked:
    pictures = choose_pictures(run.inputs, run.images, run.image_titles, shown=shown)
    measures = measure(
        run.model,
        run.inputs,
        labels=run.labels,
        batch_size=batch_size,
        robustness_images=robustness_images,
    )
    return Looked(run, measures, measure_maps(run.model, pictures), pictures)


def _numbers(item: Looked) -> Mapping[str, Any]:
    run = item.run
    return {
        "name": run.name,
        "model": run.kind,
        "parameters": run.parameters,
        "flops": run.flops,
        "accuracy": run.accuracy,
        "history": list(run.history),
        **as_numbers(item.measures),
        "statements": page.said(item.measures),
        "maps": {"layers": [layer.name for layer in item.maps.layers], "missing": item.maps.missing},
    }
