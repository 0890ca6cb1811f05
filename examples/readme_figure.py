"""Draw the picture of the README: attention maps and coding rates of a model trained on the digits.

make demo
python examples/readme_figure.py runs/demo docs/images/digits.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from cbsa_torch import interpret
from cbsa_torch.cli.runs import pictures
from cbsa_torch.train.evaluate import open_trained

SHOWN = 4


def main(run: str, output: str) -> None:
    trained = open_trained(run)
    _, dataset = trained.task.open_split(trained.spec.mode, trained.class_names, "test")
    inputs, _ = trained.task.sample(dataset, trained.spec, 360)
    rates = interpret.coding_rates(trained.model, inputs.split(64))
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
    right.suptitle("how many nats code the tokens in each layer's subspaces", fontsize=10)
    axis = right.subplots()
    layers = range(1, len(rates.layers) + 1)
    axis.plot(layers, rates.rate, marker="o", color="#2563a8", label="$R^c(Z^\\ell\\,|\\,U^\\ell)$")
    axis.plot(layers, rates.normalized, marker="o", color="#c2571a", label="tokens of unit norm")
    axis.set(xlabel="layer", ylabel="compression term (nats)", xticks=list(layers))
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
