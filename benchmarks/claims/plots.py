"""The plots of docs/results/claims.md: accuracy against cost, noise on decoders, rates, adapted ViTs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.claims import adapted, decoders, scratch
from benchmarks.claims.runs import RESULTS
from benchmarks.estimates import mean_of
from cbsa_torch._core.files import write_atomically
from cbsa_torch.interpret._style import RUN_COLORS, finish, legend
from cbsa_torch.interpret.plots import to_png

IMAGES = Path("docs/images")
MARKS = "osD^v<>P"
"""Of the members of the family, some of which cost nearly the same."""
Records = list[dict[str, Any]]


def read_all(pattern: str) -> Records:
    """The records whose names match, by name."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{pattern}.json"))]


def accuracy_and_cost() -> Figure | None:
    """Test accuracy of the family on CIFAR-10 against FLOPs and similarities."""
    groups = {form: read_all(f"scratch_{form}_seed?") for form in scratch.FORMS}
    if not all(groups.values()):
        return None
    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for color, mark, (form, records) in zip(RUN_COLORS, MARKS, groups.items(), strict=False):
        top1 = mean_of([100 * record["test_top1"] for record in records])
        for axis, key, unit in zip(panels, ("flops", "similarities"), (1e6, 1e3), strict=True):
            axis.errorbar(
                [records[0][key] / unit], [top1.value], yerr=top1.half, fmt=mark, capsize=4, color=color,
                label=scratch.FORMS[form].title,
            )  # fmt: skip
    panels[0].set(xlabel="MFLOPs of an image", ylabel="test accuracy on CIFAR-10 (JPEG), %")
    panels[1].set(xlabel="thousand pairwise similarities of an image")
    legend_below(figure, panels[0], columns=4)
    return finish(figure)


def legend_below(figure: Figure, axis: Any, columns: int) -> None:
    """The legend of a panel, for all of them, below."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def rates_of_layers() -> Figure | None:
    """Rates of representatives and of all tokens before and after each layer's step, and what is guaranteed."""
    forms = ("cbt", "certified")
    groups = {form: read_all(f"scratch_{form}_seed?") for form in forms}
    if not all(groups.values()):
        return None
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    *panels, promised = figure.subplots(1, 3)
    kinds = {"representatives": "representatives", "tokens": "all tokens, in norm(x)"}
    for axis, (kind, name) in zip(panels, kinds.items(), strict=True):
        for place, (color, form) in enumerate(zip(RUN_COLORS, forms, strict=False)):
            runs = [record["inside"]["step"]["layers"] for record in groups[form]]
            draw_steps(axis, runs, kind, color=color, label=scratch.FORMS[form].title, shift=place - 0.5)
        axis.set(xlabel="layer", ylabel="coding rate, nats", title=name)
    certified = groups["certified"]
    draw_certificate(promised, [record["inside"]["step"]["layers"] for record in certified], *RUN_COLORS[2:4])
    found = [record["inside"]["certificates"]["float64"] for record in certified]
    holding, cases = (sum(one[key] for one in found) for key in ("holding", "cases"))
    promised.set(
        xlabel="layer",
        ylabel="fall of the rate of representatives, nats",
        title=f"certified steps: guarantee kept in {holding:,} of {cases:,} cases",
    )
    legend(promised)
    for axis in (*panels, promised):
        axis.title.set_fontsize(10)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure, panels[0], columns=2)
    return finish(figure)


def draw_steps(
    axis: Any, runs: Sequence[Sequence[Any]], kind: str, *, color: str, label: str, shift: float
) -> None:
    """An arrow for each layer, from the mean rate before to that after, with the interval of the change."""
    for number, layers in enumerate(zip(*runs, strict=True), 1):
        rates = [layer[kind] for layer in layers]
        before = fmean(rate["before"] for rate in rates)
        change = mean_of([rate["after"] - rate["before"] for rate in rates])
        x, after = number + 0.3 * shift, before + change.value
        axis.annotate("", (x, after), (x, before), arrowprops={"arrowstyle": "->", "color": color, "lw": 1.8})
        axis.errorbar([x], [after], yerr=change.half, fmt="none", color=color, capsize=3, lw=1)
        axis.plot([x], [before], "o", color=color, markersize=4, label=label if number == 1 else None)


def draw_certificate(axis: Any, runs: Sequence[Sequence[Any]], *colors: str) -> None:
    """The median fall of each layer, and the median of what is guaranteed of it."""
    names = {"median_fall": "measured (median)", "median_guaranteed": "guaranteed (median)"}
    for color, (key, name) in zip(colors, names.items(), strict=True):
        layers = [mean_of([one["certificate"][key] for one in layer]) for layer in zip(*runs, strict=True)]
        axis.errorbar(
            range(1, len(layers) + 1), [one.value for one in layers], [one.half or 0.0 for one in layers],
            fmt=".-", color=color, capsize=3, label=name,
        )  # fmt: skip


def noise_and_cost() -> Figure | None:
    """Mean IoU of decoders on CamVid under noise on the attention, and what they cost."""
    groups = {form: read_all(f"decoders_{form}_seed?") for form in decoders.FORMS}
    costs = read_all("decoders_cost")
    if not all(groups.values()) or not costs:
        return None
    figure = Figure(figsize=(14, 5), layout="constrained")
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
                places, [m.value for m in means], [m.half or 0.0 for m in means], fmt=".-", color=color,
                capsize=3, label=title,
            )  # fmt: skip
        sides = costs[0]["sides"]
        counted = [one["decoders"][form]["flops"] / 1e9 for one in sides]
        flops.plot([one["side"] for one in sides], counted, ".-", color=color, label=title)
    for axis, label in ((noise, "mean IoU on test images, %"), (kept, "share that is kept, %")):
        axis.set(
            xscale="log", xlabel="standard deviation of the noise on the decoder's attention", ylabel=label
        )
        axis.set_xticks(places, ["none", *(f"{sigma:g}" for sigma in sigmas)])
        axis.minorticks_off()
    flops.set(xscale="log", yscale="log", xlabel="side of the image, pixels", ylabel="GFLOPs of the decoder")
    ticks = [224, 448, 1022, 2044]
    flops.set_xticks(ticks, list(map(str, ticks)))
    flops.minorticks_off()
    legend_below(figure, noise, columns=5)
    return finish(figure)


def adapted_accuracies() -> Figure | None:
    """Accuracy of the adapted ViT before and after recovery, all layers and the latter half."""
    rows = [(adapted.ORIGINAL, "all"), *((form, "all") for form in adapted.FORMS)]
    rows += [(form, "latter_half") for form in adapted.HALF_FORMS]
    if not read_all(f"adapted_{adapted.ORIGINAL}_all_plain_{adapted.SIDE}_seed?"):
        return None
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axis = figure.subplots()
    kinds = {"untrained": "x", "plain": "o", "distilled": "^"}
    for number, (color, (kind, mark)) in enumerate(zip(RUN_COLORS, kinds.items(), strict=False)):
        name = {"untrained": "before", "plain": "recovered", "distilled": "recovered, distilled"}[kind]
        axis.plot([], [], mark, color=color, label=name)
        for place, (form, layers) in enumerate(rows):
            end = "" if kind == "untrained" else "_seed?"
            found = read_all(f"adapted_{form}_{layers}_{kind}_{adapted.SIDE}{end}")
            if found:
                top1 = mean_of([100 * record["test_top1"] for record in found])
                x = place + 0.2 * (number - 1)
                axis.errorbar([x], [top1.value], yerr=top1.half, fmt=mark, color=color, capsize=4)
    titles = {adapted.ORIGINAL: "original", **{form: one.title for form, one in adapted.FORMS.items()}}
    where = {"all": "all layers", "latter_half": "latter half"}
    titles = {form: title.replace(", ", "\n").replace(" (", "\n(") for form, title in titles.items()}
    ticks = [f"{titles[form]}\n{where[layers]}" for form, layers in rows]
    axis.set_xticks(range(len(rows)), ticks, fontsize=8)
    axis.set(ylabel=f"test accuracy on CIFAR-10 (JPEG) at {adapted.SIDE} x {adapted.SIDE}, %")
    legend_below(figure, axis, columns=3)
    return finish(figure)


class Plot(NamedTuple):
    """A picture of the page."""

    draw: Callable[[], Figure | None]
    """None: the records are not there."""
    caption: str


PLOTS = {
    "claims_accuracy": Plot(
        accuracy_and_cost,
        "Accuracy from scratch on CIFAR-10 against cost; means and 95 % intervals over seeds.",
    ),
    "claims_rates": Plot(
        rates_of_layers,
        "From scratch on CIFAR-10: arrows go from the rate before a layer's step to that after it, with the "
        "95 % interval of the change over seeds; right, what is guaranteed of certified steps.",
    ),
    "claims_noise": Plot(
        noise_and_cost,
        "Decoders on CamVid: Gaussian noise on the parameters of their attention, with 95 % intervals over "
        "seeds; right, what they cost (counted).",
    ),
    "claims_adapted": Plot(
        adapted_accuracies,
        "A pretrained ViT with other attention, before and after recovery; means and 95 % intervals.",
    ),
}


def write() -> list[Path]:
    """Draw what there are records for; the files."""
    written = []
    for name, plot in PLOTS.items():
        figure = plot.draw()
        if figure is not None:
            written.append(IMAGES / f"{name}.png")
            write_atomically(written[-1], to_png(figure, dpi=130))
    return written


def pictures() -> str:
    """The pictures that there are, for the page."""
    found = [(name, plot) for name, plot in PLOTS.items() if (IMAGES / f"{name}.png").exists()]
    return "\n\n".join(f"![{plot.caption}](../images/{name}.png)\n\n*{plot.caption}*" for name, plot in found)
