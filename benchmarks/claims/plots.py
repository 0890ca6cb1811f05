"""The plots of docs/claims.md: accuracy against cost, noise on decoders, rates, adapted ViTs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.claims import adapted, decoders, scratch
from benchmarks.claims.runs import RESULTS
from benchmarks.estimates import mean_of
from cbsa_torch._core.files import write_atomically
from cbsa_torch.interpret._style import RUN_COLORS, finish, legend
from cbsa_torch.interpret.plots import to_png

IMAGES = Path("docs/images")
Records = list[dict[str, Any]]


def read_all(pattern: str) -> Records:
    """The records whose names match, by name."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{pattern}.json"))]


def accuracy_and_cost() -> Figure | None:
    """Test accuracy of the family on CIFAR-10 against FLOPs and similarities."""
    groups = {form: read_all(f"scratch_{form}_seed?") for form in scratch.FORMS}
    if not all(groups.values()):
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for color, (form, records) in zip(RUN_COLORS, groups.items(), strict=False):
        top1 = mean_of([100 * record["test_top1"] for record in records])
        for axis, key in zip(panels, ("flops", "similarities"), strict=True):
            axis.errorbar(
                [records[0][key] / 1e6], [top1.value], yerr=top1.half, fmt="o", capsize=3, color=color,
                label=scratch.FORMS[form].title,
            )  # fmt: skip
    panels[0].set(xlabel="MFLOPs of an image", ylabel="test accuracy on CIFAR-10 (JPEG), %")
    panels[1].set(xlabel="million pairwise similarities of an image", xscale="log")
    legend(panels[1])
    return finish(figure)


def rates_of_layers() -> Figure | None:
    """Rates of representatives and of all tokens before and after the step of each layer."""
    forms = ("cbt", "certified")
    groups = {form: read_all(f"scratch_{form}_seed?") for form in forms}
    if not all(groups.values()):
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    kinds = {"representatives": "representatives", "tokens": "all tokens, in norm(x)"}
    for axis, (kind, name) in zip(figure.subplots(1, 2), kinds.items(), strict=True):
        for color, form in zip(RUN_COLORS, forms, strict=False):
            draw_steps(axis, [record["inside"]["step"]["layers"] for record in groups[form]], kind, color, form)
        axis.set(xlabel="layer", ylabel="coding rate, nats", title=f"{name}: before and after the layer's step")
    labels = {form: scratch.FORMS[form].title for form in forms}
    found = [record["inside"]["certificates"]["float64"] for record in groups["certified"]]
    holding, cases = (sum(one[key] for one in found) for key in ("holding", "cases"))
    labels["certified"] += f": guarantee kept in {holding:,} of {cases:,} cases"
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, [labels[one] for one in names], loc="outside lower center", ncols=2, frameon=False)
    return finish(figure)


def draw_steps(axis: Any, runs: Sequence[Sequence[Any]], kind: str, color: str, form: str) -> None:
    """An arrow for each layer, from the mean rate before to that after."""
    for number, layers in enumerate(zip(*runs, strict=True), 1):
        before, after = (fmean(layer[kind][when] for layer in layers) for when in ("before", "after"))
        arrow = {"arrowstyle": "->", "color": color, "linewidth": 1.6}
        axis.annotate("", (number + 0.25, after), (number - 0.25, before), arrowprops=arrow)
        axis.plot([number + 0.25], [after], linestyle="none")  # the axes make room for the arrow
        axis.plot(
            [number - 0.25], [before], "o", color=color, markersize=4, label=form if number == 1 else None
        )


def noise_and_cost() -> Figure | None:
    """Mean IoU of decoders on CamVid under noise on the attention, and what they cost."""
    groups = {form: read_all(f"decoders_{form}_seed?") for form in decoders.FORMS}
    costs = read_all("decoders_cost")
    if not all(groups.values()) or not costs:
        return None
    figure = Figure(figsize=(13, 4), layout="constrained")
    noise, kept, flops = figure.subplots(1, 3)
    for color, (form, records) in zip(RUN_COLORS, groups.items(), strict=False):
        sigmas = records[0]["robustness"]["sigmas"]
        places = [sigmas[0] / 3, *sigmas]
        clean = [record["robustness"]["clean"] for record in records]
        noisy = [
            [fmean(record["robustness"]["values"][place]) for record in records] for place in range(len(sigmas))
        ]
        title = decoders.FORMS[form].title
        for axis, rows in (
            (noise, [clean, *noisy]),
            (kept, [[v / c for v, c in zip(row, clean, strict=True)] for row in [clean, *noisy]]),
        ):
            means = [mean_of([100 * value for value in row]) for row in rows]
            axis.errorbar(
                places, [m.value for m in means], [m.half or 0.0 for m in means], color=color, capsize=2,
                label=title,
            )  # fmt: skip
        sides = costs[0]["sides"]
        if form in sides[0]["decoders"]:
            counted = [one["decoders"][form]["flops"] / 1e9 for one in sides]
            flops.plot([one["side"] for one in sides], counted, ".-", color=color, label=title)
    for axis, label in ((noise, "mean IoU on test images, %"), (kept, "share that is kept, %")):
        axis.set(
            xscale="log", xlabel="standard deviation of the noise on the decoder's attention", ylabel=label
        )
        axis.set_xticks(places, ["none", *(f"{sigma:g}" for sigma in sigmas)])
        axis.minorticks_off()
    flops.set(xscale="log", yscale="log", xlabel="side of the image, pixels", ylabel="GFLOPs of the decoder")
    legend(noise)
    return finish(figure)


def adapted_accuracies() -> Figure | None:
    """Accuracy of the adapted ViT before and after recovery, all layers and the latter half."""
    rows = [(adapted.ORIGINAL, "all"), *((form, "all") for form in adapted.FORMS)]
    rows += [(form, "latter_half") for form in adapted.HALF_FORMS]
    if not read_all(f"adapted_{adapted.ORIGINAL}_all_plain_{adapted.SIDE}_seed?"):
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    kinds = {"untrained": "x", "plain": "o", "distilled": "^"}
    for color, (kind, mark) in zip(RUN_COLORS, kinds.items(), strict=False):
        name = {"untrained": "before", "plain": "recovered", "distilled": "recovered, distilled"}[kind]
        axis.plot([], [], mark, color=color, label=name)
        for place, (form, layers) in enumerate(rows):
            end = "" if kind == "untrained" else "_seed?"
            found = read_all(f"adapted_{form}_{layers}_{kind}_{adapted.SIDE}{end}")
            if found:
                top1 = mean_of([100 * record["test_top1"] for record in found])
                axis.errorbar([place], [top1.value], yerr=top1.half, fmt=mark, color=color, capsize=3)
    titles = {adapted.ORIGINAL: "original", **{form: one.title for form, one in adapted.FORMS.items()}}
    ticks = [f"{titles[form]}\n{layers.replace('_', ' ')}" for form, layers in rows]
    axis.set_xticks(range(len(rows)), ticks, rotation=20, ha="right", fontsize=8)
    axis.set(ylabel="test accuracy on CIFAR-10 (JPEG), %")
    legend(axis)
    return finish(figure)


PLOTS: dict[str, Callable[[], Figure | None]] = {
    "claims_accuracy": accuracy_and_cost,
    "claims_rates": rates_of_layers,
    "claims_noise": noise_and_cost,
    "claims_adapted": adapted_accuracies,
}


def write() -> list[Path]:
    """Draw what there are records for; the files."""
    written = []
    for name, draw in PLOTS.items():
        figure = draw()
        if figure is not None:
            written.append(IMAGES / f"{name}.png")
            write_atomically(written[-1], to_png(figure, dpi=130))
    return written
