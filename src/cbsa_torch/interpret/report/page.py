"""From measures to what a page shows: figures, map panels, rendered templates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from cbsa_torch.interpret import figures, plots
from cbsa_torch.interpret.report import statements
from cbsa_torch.interpret.report.maps import Maps, Pictures, mean_maps, page_data, spread
from cbsa_torch.interpret.report.measure import Measures

STATIC_LAYERS = 6
"""At most so many columns has the static panel of maps."""

NAMES = {
    "learning_curves": "Learning curves",
    "reduced": "Reduced rates",
    "steps": "Step sizes",
    "ranks": "Rank of the extraction attention",
    "coherence": "Coherence of the subspaces",
    "sparsity": "Sparsity",
    "robustness": "Robustness",
}
"""Of the sections, where one is left out."""

LABELS = {
    "learning_curves": "Loss and validation score against the epoch",
    "coding_rate": "Compression term against the layer",
    "reduced_rates": "Rate reduced on tokens against rate reduced on representatives",
    "gap": "Constraint gap per layer",
    "step_sizes": "Learned step sizes per layer and head",
    "compressing_heads": "Rate that each head's learned step takes off the tokens",
    "ranks": "Rank and effective rank of A per layer",
    "coherence": "Coherence between heads per layer",
    "sparsity": "Share of zeros after each ISTA",
    "robustness": "Metric against the size of the noise",
}
"""Of the figures of measures, with what screen readers say."""

PANELS = ("attention_maps", "receptive_fields")
"""Of maps."""


def measure_figures(measures: Measures) -> dict[str, Figure]:
    """A figure for every measure there is."""
    places, reduced = numbers(measures), measures.reduced
    drawn = {"coding_rate": plots.rates_per_layer(measures.rates)}
    if reduced is not None:
        drawn["reduced_rates"] = plots.reduced_rates_panel(reduced, places(reduced.layers))
        drawn["gap"] = plots.gap_per_layer(reduced, places(reduced.layers))
    if measures.steps:
        drawn["step_sizes"] = plots.step_sizes([*measures.steps.values()], places(measures.steps))
    if reduced is not None:
        drawn["compressing_heads"] = plots.compressing_heads(reduced, places(reduced.layers))
    if measures.ranks is not None:
        drawn["ranks"] = plots.ranks_per_layer(measures.ranks, places(measures.ranks.layers))
    if measures.coherence:
        drawn["coherence"] = plots.coherence_maps(measures.coherence, places(measures.coherence))
    if measures.sparsity is not None:
        drawn["sparsity"] = plots.sparsity_per_layer(measures.sparsity, places(measures.sparsity.layers))
    if measures.robustness is not None:
        drawn["robustness"] = plots.robustness_curve({"model": measures.robustness}, measures.robustness_metric)
    return drawn


def numbers(measures: Measures) -> Callable[[Iterable[str]], list[int]]:
    """A function from names of layers to their places, from 1, among all attention layers of the model.

    A layer that is no attention layer (ISTA) has the place of the one in its block. Where that is not so for
    every name, they are counted.
    """
    places = {name: i for i, name in enumerate(measures.rates.layers, 1)}
    blocks = {name.rpartition(".")[0]: i for name, i in places.items()}

    def find(names: Iterable[str]) -> list[int]:
        names = list(names)
        found = [places.get(name, blocks.get(name.rpartition(".")[0], 0)) for name in names]
        return found if len(set(found) - {0}) == len(names) else list(range(1, len(names) + 1))

    return find


def said(measures: Measures) -> dict[str, str]:
    """The page's findings in words."""
    sentences = {"later_half": statements.later_half_sentence(measures.rates)}
    if measures.reduced is not None:
        sentences["together"] = statements.together_sentence(measures.reduced)
        sentences["gap"] = statements.gap_sentence(measures.reduced)
        sentences["heads"] = statements.heads_sentence(measures.reduced)
    return sentences


def left_out(measures: Measures, maps: Maps, history: Sequence[Any]) -> dict[str, str]:
    """What is not shown of a model, and why."""
    missing = measures.missing if history else {"learning_curves": "no history was given", **measures.missing}
    reasons = {NAMES[name]: reason for name, reason in missing.items()}
    by_reason: dict[str, list[str]] = {}
    for layer, reason in maps.missing.items():
        by_reason.setdefault(reason, []).append(layer)
    for reason, layers in by_reason.items():
        reasons[f"Attention maps of {', '.join(layers)}"] = reason
    return reasons


def map_figures(maps: Maps, pictures: Pictures) -> dict[str, Figure]:
    """The static panels: attention maps, and receptive fields where there are any."""
    if not maps.layers:
        return {}
    chosen = mean_maps(maps, spread(len(maps.layers), STATIC_LAYERS))
    drawn = {"attention_maps": plots.attention_panel(pictures.images, chosen, pictures.titles)}
    with_fields = [layer for layer in maps.layers if layer.fields is not None]
    if with_fields:
        rows = [
            (f"layer {layer.number}", layer.fields[0][spread(layer.fields.shape[1], 8)])
            for layer in (with_fields[i] for i in spread(len(with_fields), STATIC_LAYERS))
            if layer.fields is not None
        ]
        drawn["receptive_fields"] = plots.receptive_field_panel(pictures.images[0], rows)
    return drawn


def map_section(maps: Maps, pictures: Pictures, drawn: Mapping[str, Figure]) -> dict[str, Any] | None:
    """What the template's ``maps`` macro needs, or None if no layer has a map."""
    if not maps.layers:
        return None
    fields = drawn.get("receptive_fields")
    return {
        "data": page_data(maps, pictures),
        "panel": figures.png_url(drawn["attention_maps"]),
        "fields": None if fields is None else figures.png_url(fields),
        "titles": pictures.titles,
        "first": maps.first,
        "notes": maps.notes,
    }


def save_all(drawn: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write every figure as PNG and SVG."""
    return [path for name, figure in drawn.items() for path in figures.save(figure, folder, name)]


def remove_stale(folder: Path, written: Sequence[Path], prefix: str = "") -> None:
    """Remove figures that an earlier page left in ``folder``: only files that such a page writes.

    Args:
        folder: of the figures.
        written: those of the new page.
        prefix: of the names of the page's figures. With one, names may end in ``_`` and a number.
    """
    known = re.compile(rf"{prefix}({'|'.join((*LABELS, *PANELS))}){'(_[0-9]+)?' if prefix else ''}[.](png|svg)")
    for path in folder.iterdir() if folder.is_dir() else ():
        if known.fullmatch(path.name) and path not in written:
            path.unlink()


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder."""
    environment = Environment(
        loader=PackageLoader("cbsa_torch.interpret.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
