"""Draw the pictures of the README and of docs/reference/certificate.md, of the model that the demo trains.

make demo
python examples/demo_figures.py runs/demo docs/images
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cbsa_torch import interpret
from cbsa_torch.cli.runs import pictures
from cbsa_torch.interpret import Certificate, LayerCertificate
from cbsa_torch.train.evaluate import open_trained
from cbsa_torch.train.tasks.base import Trained

SHOWN = 4
BLUE, ORANGE, GREY = "#2563a8", "#c2571a", "#8a8f98"


def main(run: str, folder: str) -> None:
    trained = open_trained(run)
    dataset = trained.task.open_split(trained.spec.mode, trained.class_names, "test").dataset
    inputs, _ = trained.task.sample(dataset, trained.spec, 360)
    measured = interpret.certificate(trained.model, inputs)
    print(measured)
    print(f"it holds in {measured.holding:,} of {measured.cases:,} cases")
    print(f"the rate of all tokens fell in {measured.compressed:,}")
    print(f"median of the limit that a step uses: {100 * measured.share:.0f} %")
    Path(folder).mkdir(parents=True, exist_ok=True)
    maps_and_rates(trained, inputs[:SHOWN], measured).savefig(f"{folder}/digits.png", dpi=110)
    guaranteed_and_measured(measured).savefig(f"{folder}/certificate.png", dpi=110)


def maps_and_rates(trained: Trained, inputs: Tensor, measured: Certificate) -> Figure:
    """Where the class token looks; the rates before and after each step."""
    with torch.no_grad(), interpret.capture(trained.model) as records:
        output = trained.model(inputs)
    labels = [trained.class_names[i] for i in output.argmax(-1).tolist()]
    images = pictures(trained, inputs, labels).images

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1], squeeze=False)[0]
    left.suptitle("where the class token looks, layer by layer", fontsize=10)
    axes = left.subplots(len(images), 1 + len(records))
    for i, row in enumerate(axes):
        row[0].imshow(images[i], cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(f"read as {labels[i]}", fontsize=8)
        for axis, record in zip(row[1:], records.values(), strict=True):
            axis.imshow(interpret.cls_attention_maps(record).mean(1)[i].numpy(), cmap="magma")
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for index, axis in enumerate(axes[0]):
        axis.set_title("image" if index == 0 else f"layer {index}", fontsize=8)

    right.suptitle(f"rates before and after each step: {measured.cases:,} cases, all fell", fontsize=10)
    assert measured.holding == measured.compressed == measured.cases, "what the title says"
    upper, lower = right.subplots(2, 1, sharex=True)
    rates_of_representatives(upper, measured.layers)
    upper.set_ylabel("representatives (nats)")
    before_and_after(lower, [(x.tokens_before, x.tokens_after) for x in measured.layers])
    lower.set(xlabel="layer", ylabel="all tokens (nats)")
    return figure


def guaranteed_and_measured(measured: Certificate) -> Figure:
    """The rates of the representatives; the measured fall against the guaranteed one, case by case."""
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    rates_of_representatives(left, measured.layers)
    left.set(xlabel="layer", ylabel="rate of the representatives (nats)")
    left.set_title("sum over heads, mean over images", fontsize=10)
    for index, layer in enumerate(measured.layers):
        shade = mpl.colormaps["viridis_r"](0.15 + 0.85 * index / max(len(measured.layers) - 1, 1))
        fall = (layer.before - layer.after).flatten()
        style: dict[str, Any] = {"color": shade, "markersize": 3, "label": f"layer {index + 1}"}
        right.plot(guaranteed(layer).flatten().numpy(), fall.numpy(), ".", **style)
    low = min(guaranteed(layer).min().item() for layer in measured.layers)
    high = right.get_ylim()[1]
    right.plot([low, high], [low, high], color=ORANGE, linewidth=1.2, label="guaranteed")
    right.set(xscale="log", yscale="log", xlabel="guaranteed fall (nats)", ylabel="measured fall (nats)")
    right.set_title(f"{measured.cases:,} cases: every head, layer and image", fontsize=10)
    right.legend(frameon=False, fontsize=8, markerscale=3)
    plain(right)
    return figure


def rates_of_representatives(axis: Axes, layers: list[LayerCertificate]) -> None:
    """Before and after each step, and what the theorem leaves at most."""
    before_and_after(axis, [(x.before, x.after) for x in layers])
    most = [total(x.before - guaranteed(x)) for x in layers]
    style: dict[str, Any] = {"color": ORANGE, "markersize": 20, "markeredgewidth": 2}
    axis.plot(range(1, len(layers) + 1), most, "_", label="guaranteed: at most", **style)
    axis.legend(frameon=False, fontsize=8)


def before_and_after(axis: Axes, rates: list[tuple[Tensor, Tensor]]) -> None:
    """A grey and a blue point for each layer, and a line from one to the other."""
    layers = range(1, len(rates) + 1)
    before, after = ([total(rate) for rate in column] for column in zip(*rates, strict=True))
    axis.vlines(layers, before, after, color=BLUE, alpha=0.5)
    axis.plot(layers, before, "o", color=GREY, label="before the step")
    axis.plot(layers, after, "o", color=BLUE, label="after")
    axis.set(xticks=list(layers), xlim=(0.5, len(rates) + 0.5))
    plain(axis)


def guaranteed(layer: LayerCertificate) -> Tensor:
    assert layer.guaranteed is not None, "every step of the demo is certified"
    return layer.guaranteed


def total(rates: Tensor) -> float:
    """``(images, H)``: sum over heads, mean over images."""
    return rates.sum(1).mean().item()


def plain(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main(*sys.argv[1:])
