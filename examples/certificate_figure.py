"""Draw the picture of docs/certificate.md: what certified steps guarantee, and what they do.

cbsa train --config digits --model.args step certified --output runs/certified
python examples/certificate_figure.py runs/certified docs/images/certificate.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from cbsa_torch import interpret
from cbsa_torch.train.evaluate import open_trained

BLUE, ORANGE, GREY = "#2563a8", "#c2571a", "#8a8f98"


def main(run: str, output: str) -> None:
    trained = open_trained(run)
    _, dataset = trained.task.open_split(trained.spec.mode, trained.class_names, "test")
    inputs, _ = trained.task.sample(dataset, trained.spec, 360)
    measured = interpret.certificate(trained.model, inputs)
    print(measured)
    print(f"it holds in {measured.holding:,} of {measured.cases:,} cases")
    print(f"the rate of all tokens fell in {measured.compressed:,}")
    print(f"median of the limit that a step uses: {100 * measured.share:.0f} %")

    figure = Figure(figsize=(11, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    layers = range(1, len(measured.layers) + 1)
    before = [layer.before.sum(1).mean().item() for layer in measured.layers]
    after = [layer.after.sum(1).mean().item() for layer in measured.layers]
    most = [(x.before - x.guaranteed).sum(1).mean().item() for x in measured.layers if x.guaranteed is not None]
    left.vlines(layers, before, after, color=BLUE, alpha=0.5)
    left.plot(layers, before, "o", color=GREY, label="before the step")
    left.plot(layers, after, "o", color=BLUE, label="after")
    left.plot(layers, most, "_", color=ORANGE, markersize=20, markeredgewidth=2, label="guaranteed: at most")
    left.set(
        xlabel="layer",
        ylabel="rate of the representatives (nats)",
        xticks=list(layers),
        xlim=(0.5, len(layers) + 0.5),
    )
    left.set_title("sum over heads, mean over images", fontsize=10)
    for number, layer in zip(layers, measured.layers, strict=True):
        assert layer.guaranteed is not None, "every step is certified"
        shade = mpl.colormaps["viridis_r"](0.15 + 0.85 * (number - 1) / max(len(layers) - 1, 1))
        fall = (layer.before - layer.after).flatten()
        right.plot(layer.guaranteed.flatten(), fall, ".", color=shade, markersize=3, label=f"layer {number}")
    low, high = right.get_xlim()[0], right.get_ylim()[1]
    right.set(xscale="log", yscale="log", xlabel="guaranteed fall (nats)", ylabel="measured fall (nats)")
    low = min(layer.guaranteed.min().item() for layer in measured.layers if layer.guaranteed is not None)
    right.plot([low, high], [low, high], color=ORANGE, linewidth=1.2, label="guaranteed")
    right.set_title(f"{measured.cases:,} cases: every head, layer and image", fontsize=10)
    right.legend(frameon=False, fontsize=8, markerscale=3)
    left.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
