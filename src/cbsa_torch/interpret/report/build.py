"""Arrange measurements and figures on one page; the numbers also go to a JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor, nn

from cbsa_torch._core.checks import check_positive_int
from cbsa_torch.interpret import plots
from cbsa_torch.interpret.attention_maps import cls_attention_maps
from cbsa_torch.interpret.capture import capture
from cbsa_torch.interpret.rates import coding_rates


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
    shown: int = 6,
    batch_size: int = 64,
) -> ReportFiles:
    """Write ``report.html``, ``report.json`` and ``figures/`` into ``folder``.

    Args:
        model: a trained model with CBSA layers, in eval mode.
        inputs: ``(B, C, height, width)`` what the model is fed; all of them measure the rates.
        images: the same images to look at, ``(B, height, width[, 3])`` in [0, 1].
        title: heading of the page.
        facts: the model card, name to value.
        history: one row per epoch with epoch, train_loss, val_loss, val_top1.
        evaluation: top1, loss, images, confusion, class_names, split of a test.
        image_titles: captions of the images.
        shown: how many images get attention maps.
        batch_size: images per forward pass.
    """
    check_positive_int("shown", shown)
    check_positive_int("batch_size", batch_size)
    if len(images) != len(inputs):
        raise ValueError(f"images must be those of inputs: got {len(images)} images and {len(inputs)} inputs")
    shown = min(shown, len(images))
    if image_titles is not None and len(image_titles) < shown:
        raise ValueError(f"image_titles must be at least {shown}, got {len(image_titles)}")
    folder = Path(folder)
    figure_folder = folder / "figures"
    figure_folder.mkdir(parents=True, exist_ok=True)
    rates = coding_rates(model, inputs.split(batch_size))
    with torch.no_grad(), capture(model) as records:
        model(inputs[:shown])
    maps = []
    for index, record in enumerate(records.values()):
        mean_over_heads = cls_attention_maps(record).mean(1)
        maps.append((f"layer {index + 1}", mean_over_heads.cpu().float().numpy()))
    figures = {
        "coding_rate": plots.rates_per_layer(rates),
        "attention_maps": plots.attention_panel(
            images[:shown], _spread(maps), None if image_titles is None else image_titles[:shown]
        ),
    }
    if history:
        figures["learning_curves"] = plots.learning_curves(history)
    written = []
    for name, figure in figures.items():
        for suffix, data in ((".png", plots.to_png(figure)), (".svg", plots.to_svg(figure).encode())):
            path = figure_folder / f"{name}{suffix}"
            path.write_bytes(data)
            written.append(path)

    environment = Environment(
        loader=PackageLoader("cbsa_torch.interpret.report", "."), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("template.html.j2").render(
        title=title,
        facts=facts,
        evaluation=evaluation,
        best=max(history, key=lambda row: row["val_top1"]) if history else None,
        rates=rates,
        svg={name: plots.to_svg(figure) for name, figure in figures.items() if name != "attention_maps"},
        maps=plots.to_data_url(figures["attention_maps"]),
        shown=shown,
    )
    files = ReportFiles(folder / "report.html", folder / "report.json", written)
    files.page.write_text(page, encoding="utf-8")
    numbers = {
        "title": title,
        "facts": dict(facts),
        "history": list(history),
        "evaluation": evaluation,
        "coding_rate": rates._asdict(),
    }
    files.numbers.write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    return files


def _spread(maps: list[tuple[str, np.ndarray]], most: int = 6) -> list[tuple[str, np.ndarray]]:
    """At most ``most`` layers, evenly spread, first and last included."""
    if len(maps) <= most:
        return maps
    return [maps[round(i * (len(maps) - 1) / (most - 1))] for i in range(most)]
