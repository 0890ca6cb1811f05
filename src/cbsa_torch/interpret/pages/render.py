"""From measurements to what a page shows: figures, maps, reasons for what is missing, filled templates."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from torch import Tensor

from cbsa_torch._core.files import write_atomically
from cbsa_torch._core.text import readable
from cbsa_torch.interpret import plots
from cbsa_torch.interpret.pages import embed
from cbsa_torch.interpret.pages.maps import Maps, Pictures, evenly_spaced, page_data
from cbsa_torch.interpret.pages.measures import Measures

PANEL_LAYERS = 6
"""At most so many layers are in the static panels of maps."""

SECTIONS = {
    "learning_curves": "Learning curves",
    "reduced": "Reduced rates",
    "steps": "Step sizes",
    "ranks": "Rank of the extraction attention",
    "coherence": "Coherence of the subspaces",
    "sparsity": "Sparsity",
    "robustness": "Robustness",
}
"""A measure that a page may lack, to what the list of what is left out calls it."""

FIGURE_LABELS = {
    "certificate": "Rate of the representatives and of all tokens before and after each layer's step",
    "learning_curves": "Loss and validation score against the epoch",
    "coding_rate": "Compression term against the layer",
    "reduced_rates": "Reduction of the tokens' rate against that of the representatives'",
    "gap": "Constraint gap per layer",
    "step_sizes": "Learned step sizes per layer and head",
    "compressing_heads": "Reduction of the tokens' rate by each head's learned step",
    "ranks": "Rank and effective rank of A per layer",
    "coherence": "Coherence between heads per layer",
    "sparsity": "Share of zeros after each ISTA",
    "robustness": "Metric against the size of the noise",
}
"""Name of a figure of measures to its text alternative, for screen readers."""

MAP_FIGURES = ("attention_maps", "receptive_fields")
"""Names of the figures that show maps."""


class PageFiles(NamedTuple):
    """What was written."""

    page: Path
    numbers: Path
    figures: list[Path]


def measure_figures(measures: Measures) -> dict[str, Figure]:
    """A figure for every measure there is."""

    def numbers(layers: Iterable[str]) -> list[int]:
        return layer_numbers(measures, layers)

    figures = {"coding_rate": plots.rates_per_layer(measures.rates)}
    if measures.certificate is not None:
        layers = measures.certificate.certified
        figures["certificate"] = plots.certified_rates(layers, numbers(layer.name for layer in layers))
    reduced = measures.reduced
    if reduced is not None:
        figures["reduced_rates"] = plots.reduced_rates_panel(reduced, numbers(reduced.layers))
        figures["gap"] = plots.gap_per_layer(reduced, numbers(reduced.layers))
        figures["compressing_heads"] = plots.compressing_heads(reduced, numbers(reduced.layers))
    if measures.steps:
        figures["step_sizes"] = plots.step_sizes([*measures.steps.values()], numbers(measures.steps))
    if measures.ranks is not None:
        figures["ranks"] = plots.ranks_per_layer(measures.ranks, numbers(measures.ranks.layers))
    if measures.coherence:
        figures["coherence"] = plots.coherence_maps(measures.coherence, numbers(measures.coherence))
    if measures.sparsity is not None:
        figures["sparsity"] = plots.sparsity_per_layer(measures.sparsity, numbers(measures.sparsity.layers))
    if measures.robustness is not None:
        figures["robustness"] = plots.robustness_curve({"": measures.robustness}, measures.robustness_metric)
    return figures


def layer_numbers(measures: Measures, names: Iterable[str]) -> list[int]:
    """The numbers of layers, from 1, among all attention layers of the model.

    A layer that is no attention layer (ISTA) has the number of the one in its block. If some name has no
    number of its own by this, all are numbered 1, 2, ...
    """
    names = list(names)
    attention = {name: i for i, name in enumerate(measures.rates.layers, 1)}
    blocks = {name.rpartition(".")[0]: i for name, i in attention.items()}
    found = [attention.get(name, blocks.get(name.rpartition(".")[0], 0)) for name in names]
    return found if len(set(found) - {0}) == len(names) else list(range(1, len(names) + 1))


def left_out(measures: Measures, maps: Maps, history: Sequence[Any]) -> dict[str, str]:
    """What is not shown of a model, and why."""
    missing = measures.missing if history else {"learning_curves": "no history was given", **measures.missing}
    reasons = {SECTIONS[name]: reason for name, reason in missing.items()}
    by_reason: dict[str, list[str]] = {}
    for layer, reason in maps.missing.items():
        by_reason.setdefault(reason, []).append(layer)
    for reason, layers in by_reason.items():
        reasons[f"Attention maps of {', '.join(layers)}"] = reason
    return reasons


def map_figures(maps: Maps, pictures: Pictures) -> dict[str, Figure]:
    """The static panels, of means over heads: attention maps, and receptive fields where there are any."""
    if not maps.layers:
        return {}
    chosen = [maps.layers[i] for i in evenly_spaced(len(maps.layers), PANEL_LAYERS)]
    means = [(f"layer {layer.number}", layer.maps[:, 0]) for layer in chosen]
    figures = {"attention_maps": plots.attention_panel(pictures.images, means, pictures.titles)}
    fields = [(layer.number, layer.fields[0]) for layer in maps.layers if layer.fields is not None]
    if fields:
        chosen_fields = [fields[i] for i in evenly_spaced(len(fields), PANEL_LAYERS)]
        rows = [(f"layer {number}", values[evenly_spaced(len(values), 8)]) for number, values in chosen_fields]
        figures["receptive_fields"] = plots.receptive_field_panel(pictures.images[0], rows)
    return figures


def map_section(maps: Maps, pictures: Pictures, figures: Mapping[str, Figure]) -> dict[str, Any] | None:
    """What the template's ``maps`` macro needs, or None if no layer has a map."""
    if not maps.layers:
        return None
    fields = figures.get("receptive_fields")
    return {
        "data": page_data(maps, pictures),
        "panel": embed.png_url(figures["attention_maps"]),
        "fields": None if fields is None else embed.png_url(fields),
        "titles": pictures.titles,
        "token": maps.token,
        "notes": maps.notes,
    }


def panels(figures: Mapping[str, Figure], suffix: str = "", title: str = "") -> dict[str, embed.Panels | None]:
    """The figures of measures as a template needs them; None for each that there is not.

    Args:
        figures: by the names of :data:`FIGURE_LABELS`.
        suffix: of ids in the SVG; different for figures of one name on one page.
        title: whose they are, added to the text alternatives.
    """
    return {
        name: embed.cut(figures[name], f"{name}{suffix}", f"{label}{title}") if name in figures else None
        for name, label in FIGURE_LABELS.items()
    }


def fill(template: str, **values: Any) -> str:
    """Fill a template of this folder."""
    environment = Environment(
        loader=PackageLoader("cbsa_torch.interpret.pages", "."),
        autoescape=True,
        finalize=_as_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _as_shown(value: Any) -> Any:
    """Users' strings on a page; HTML of ours is left alone, and jinja2 escapes what is returned."""
    return readable(value, lines=True) if isinstance(value, str) and not hasattr(value, "__html__") else value


def save_figures(figures: Mapping[str, Figure], folder: Path, prefix: str = "") -> list[Path]:
    """Write every figure as PNG and SVG into ``folder/figures``, under ``prefix`` and its name."""
    place = folder / "figures"
    return [path for name, figure in figures.items() for path in embed.save(figure, place, prefix + name)]


def write_page(files: PageFiles, page: str, numbers: Any, prefix: str = "") -> PageFiles:
    """Write the page and its numbers, and remove figures that an earlier page of this kind left beside its own.

    Args:
        files: where to; the figures are written already.
        page: the HTML.
        numbers: what goes into the JSON file.
        prefix: of the figures' files. With one, their names may end in ``_`` and a number.
    """
    write_atomically(files.page, page.encode())
    write_atomically(files.numbers, json.dumps(finite(numbers), allow_nan=False, indent=2).encode())
    names, number = "|".join((*FIGURE_LABELS, *MAP_FIGURES)), "(_[0-9]+)?" if prefix else ""
    for path in (files.page.parent / "figures").iterdir():
        if re.fullmatch(rf"{prefix}({names}){number}[.](png|svg)", path.name) and path not in files.figures:
            path.unlink()
    return files


def numbers_of(measures: Measures, sentences: Mapping[str, str], maps: Maps) -> dict[str, Any]:
    """What the JSON file of a page holds of a model, by name."""
    numbers = measures._asdict()
    numbers["coding_rate"] = numbers.pop("rates")
    numbers["certificate"] = measures.certificate and measures.certificate.record()
    shown = {"layers": [layer.name for layer in maps.layers], "missing": maps.missing}
    return {**numbers, "statements": sentences, "maps": shown}


def finite(value: Any) -> Any:
    """Plain values with None for NaN and infinity, which JSON does not know, however deep inside.

    Named tuples and mappings become dictionaries, lists and tuples lists, tensors and arrays nested lists;
    anything else stays as it is.
    """
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
