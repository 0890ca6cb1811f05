"""Draw the picture of the README: attention maps and certified steps of a model trained on the digits.

make demo
python examples/readme_figure.py runs/demo docs/images/digits.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from cbsa_torch import interpret
from cbsa_torch.cli.runs import pictures
from cbsa_torch.train.evaluate import open_trained

SHOWN = 4


def main(run: str, output: str) -> None:
    trained = open_trained(run)
    _, dataset = trained.task.open_split(trained.spec.mode, trained.class_names, "test")
    inputs, _ = trained.task.sample(dataset, trained.spec, 360)
    measured = interpret.certificate(trained.model, inputs)
    print(measured)
    with torch.no_grad(), interpret.capture(trained.model) as records:
        model_output = trained.model(inputs[:SHOWN])
    labels = [trained.class_names[i] for i in model_output.argmax(-1).tolist()]
    images = pictures(trained, inputs[:SHOWN], labels).images

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1], squeeze=False)[0]
    left.suptitle("where the class token looks, layer by layer", fontsize=10)
    axes = left.subplots(SHOWN, 1 + len(records))
    for i, row in enumerate(axes):
        row[0].imshow(images[i], cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(f"read as {labels[i]}", fontsize=8)
        for axis, record in zip(row[1:], records.values(), strict=True):
            axis.imshow(interpret.cls_attention_maps(record).mean(1)[i], cmap="magma")
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for index, axis in enumerate(axes[0]):
        axis.set_title("image" if index == 0 else f"layer {index}", fontsize=8)
    right.suptitle(f"rates before and after each step: {measured.cases:,} cases, all fell", fontsize=10)
    assert measured.holding == measured.compressed == measured.cases, "what the title says"
    upper, lower = right.subplots(2, 1, sharex=True)
    layers = range(1, len(measured.layers) + 1)
    rates = {
        "representatives": [(x.before, x.after) for x in measured.layers],
        "all tokens": [(x.tokens_before, x.tokens_after) for x in measured.layers],
    }
    for axis, (what, pairs) in zip((upper, lower), rates.items(), strict=True):
        before, after = ([_total(rate) for rate in pair] for pair in zip(*pairs, strict=True))
        axis.vlines(layers, before, after, color="#2563a8", alpha=0.5)
        axis.plot(layers, before, "o", color="#8a8f98", label="before")
        axis.plot(layers, after, "o", color="#2563a8", label="after")
        axis.set(ylabel=f"{what} (nats)", xticks=list(layers), xlim=(0.5, len(layers) + 0.5))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    most = [_total(x.before - x.guaranteed) for x in measured.layers if x.guaranteed is not None]
    upper.plot(
        layers, most, "_", color="#c2571a", markersize=20, markeredgewidth=2, label="guaranteed: at most"
    )
    upper.legend(frameon=False, fontsize=8)
    lower.set_xlabel("layer")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


def _total(rates: Tensor) -> float:
    """``(images, H)``: sum over heads, mean over images."""
    return rates.sum(1).mean().item()


if __name__ == "__main__":
    main(*sys.argv[1:])
