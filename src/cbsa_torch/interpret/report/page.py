"""From measures to what a page shows: figures, map panels, rendered templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from cbsa_torch.interpret import figures, plots
from cbsa_torch.interpret.report.maps import Maps, Pictures, mean_maps, page_data, spread
from cbsa_torch.interpret.report.measure import Measures

STATIC_LAYERS = 6
"""At most so many columns has the static panel of maps."""

NAMES = {
    "reduced": "Reduced rates",
    "steps": "Step sizes",
    "ranks": "Rank of the extraction attention",
    "coherence": "Coherence of the subspaces",
    "sparsity": "Sparsity",
    "robustness": "Robustness",
}
"""Of the sections, where one is left out."""

LABELS = {
    "learning_curves": "Loss and validation accuracy against the epoch",
    "coding_rate": "Compression term against the layer",
    "reduced_rates": "Rate reduced on tokens against rate reduced on representatives",
    "step_sizes": "Learned step sizes per layer and head",
    "compressing_heads": "Rate that each head's learned step takes off the tokens",
    "ranks": "Rank and effective rank of A per layer",
    "coherence": "Coherence between heads per layer",
    "sparsity": "Share of zeros after each ISTA",
    "robustness": "Metric against the size of the noise",
}
"""What screen readers say."""


def measure_figures(measures: Measures) -> dict[str, Figure]:
    """A figure for every measure there is."""
    drawn = {"coding_rate": plots.rates_per_layer(measures.rates)}
    if measures.reduced is not None:
        drawn["reduced_rates"] = plots.reduced_rates_panel(measures.reduced)
        drawn["step_sizes"] = plots.step_sizes(measures.reduced)
        drawn["compressing_heads"] = plots.compressing_heads(measures.reduced)
    if measures.ranks is not None:
        drawn["ranks"] = plots.ranks_per_layer(measures.ranks)
    if measures.coherence:
        drawn["coherence"] = plots.coherence_maps(measures.coherence)
    if measures.sparsity is not None:
        drawn["sparsity"] = plots.sparsity_per_layer(measures.sparsity)
    if measures.robustness is not None:
        drawn["robustness"] = plots.robustness_curve({"model": measures.robustness}, measures.robustness_metric)
    return drawn


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
        drawn["receptive_fields"] = figures.receptive_field_panel(pictures.images[0], rows)
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
    }


def save_all(drawn: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write every figure as PNG and SVG."""
    return [path for name, figure in drawn.items() for path in figures.save(figure, folder, name)]


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
