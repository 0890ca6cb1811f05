"""What a layer with a certificate gives and costs: train every form of the study, measure it, make the tables.

    python -m benchmarks.certified_study train --cifar DIR --animals DIR    # all runs that are left
    python -m benchmarks.certified_study train --only "digits_*" --list     # their names
    python -m benchmarks.certified_study measure --only "digits_*"          # measure trained models again
    python -m benchmarks.certified_study cost                               # steps, on a quiet machine
    python -m benchmarks.certified_study table                              # from the records alone

A run is a data set, a form of the model, a seed and perhaps a depth. It is trained by
:func:`cbsa_torch.train.train` on one thread by the unchanged recipe of its data set, measured, and recorded
at once in a file of its own, ``benchmarks/results/certified/NAME.json``. Records say what is left to do:
the command can be stopped at any time and goes on where it was, within a run, too. ``table`` writes
``table.md`` and ``figure.png`` beside them.

CIFAR-10 is read from a folder (``DIR/{train,test}/CLASS/*.jpg``); the first images of every class, by name, are
the subset that is used. What is said about it is about that subset and that short recipe alone.
"""

from __future__ import annotations

import fnmatch
import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any, Literal, NamedTuple

import timm
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.estimates import difference, markdown, mean_of, percent
from benchmarks.inside import BOUNDS, measure, rounded
from benchmarks.subset import link_images
from cbsa_torch._core.files import write_atomically
from cbsa_torch.bench import measure as bench_measure
from cbsa_torch.ops.cbsa import certified as certified_ops
from cbsa_torch.train import TrainConfig, evaluate_checkpoint, load_config, train
from cbsa_torch.train.evaluate import open_trained
from cbsa_torch.train.run.folder import RunFolder, environment

RESULTS = Path("benchmarks/results/certified")

SQRT = "sqrt(p)"
"""At the end of eps: times the square root of the dimension of a head."""
EXACT = {"contraction": "exact", "tied": True, "orthogonal": True}
CERTIFIED = {"step": "certified", "residual": "input"}
NORM = {**CERTIFIED, "residual": "norm"}
FROBENIUS = {"BOUND": "frobenius"}
PRODUCT = {"BOUND": "product"}
GRAM = {"BOUND": "gram"}
GRADIENT = {"BOUND_IN_GRADIENT": True}


class Form(NamedTuple):
    """A form of the model."""

    family: str
    args: dict[str, Any]
    """Of the model and its mixer."""
    switches: dict[str, Any] = {}  # noqa: RUF012
    """Globals of :mod:`cbsa_torch.ops.cbsa.certified` that differ."""


FORMS = {
    "default": Form("cbt", {}),
    "orthogonal": Form("cbt", {"orthogonal": True}),
    "tied": Form("cbt", {"tied": True, "orthogonal": True}),
    "exact_untied": Form("cbt", {"contraction": "exact", "eps": SQRT}),
    "exact_eps1": Form("cbt", {**EXACT, "eps": 1.0}),
    "exact_sqrt": Form("cbt", {**EXACT, "eps": SQRT}),
    "certified": Form("cbt", CERTIFIED, FROBENIUS),
    "certified_norm": Form("cbt", NORM, FROBENIUS),
    "certified_norm_product": Form("cbt", NORM, PRODUCT),
    "certified_norm_gram": Form("cbt", NORM, GRAM),
    "certified_norm_gram_gradient": Form("cbt", NORM, {**GRAM, **GRADIENT}),
    "certified_eps0.1": Form("cbt", {**CERTIFIED, "eps": 0.1}, FROBENIUS),
    "certified_eps1": Form("cbt", {**CERTIFIED, "eps": 1.0}, FROBENIUS),
    "certified_eps4sqrt": Form("cbt", {**CERTIFIED, "eps": f"4 {SQRT}"}, FROBENIUS),
    "certified_gradient": Form("cbt", CERTIFIED, {**FROBENIUS, **GRADIENT}),
    "certified_gram": Form("cbt", CERTIFIED, GRAM),
    "certified_product": Form("cbt", CERTIFIED, PRODUCT),
    "certified_product_gradient": Form("cbt", CERTIFIED, {**PRODUCT, **GRADIENT}),
    "crate": Form("crate", {}),
    "tost": Form("tost", {}),
}
"""The forms by name, one change at a time. Without a word, certified forms have the usual block, eps = sqrt(p),
the bound by Frobenius norms and no gradient through it. ``norm``: the block carries norm1(x) + attn(norm1(x)).
``gram``: the bound from the Gram matrix, which the library kept; the others were there until commit d0b305c."""


def is_there(form: str) -> bool:
    """Whether this version of the library has the form."""
    switches = FORMS[form].switches
    return switches in ({}, GRAM) or all(hasattr(certified_ops, name) for name in switches)


class DataSet(NamedTuple):
    """How a data set is trained on."""

    recipe: str
    model: str
    """Name of the model without its family."""
    head_dim: int
    measured: int
    """Test images that rates are measured on, at most."""


DATA = {
    "digits": DataSet("digits", "pico_patch1_8", 24, 360),
    "animals28": DataSet("animals28", "nano_patch4_28", 32, 250),
    "cifar": DataSet("animals28", "nano_patch4_32", 32, 250),
    "cifar_full": DataSet("animals28", "nano_patch4_32", 32, 250),
}


class Subset(NamedTuple):
    """A part of CIFAR-10 and how often it is seen."""

    train: int
    """Images of each of the ten classes, of which a tenth are held out for validation."""
    test: int
    epochs: int


CIFAR = {"cifar": Subset(1500, 500, 5), "cifar_full": Subset(5000, 1000, 4)}
COST_STEPS = 15
"""Training steps of each form that are timed."""
CERTIFIED_SHOWN = ("certified_norm_gram",)
"""Certified forms in the figure of rates."""


class Run(NamedTuple):
    """One training run."""

    data: str
    form: str
    seed: int
    depth: int | None = None
    """Layers. Default: the model's."""

    @property
    def name(self) -> str:
        """Names folder and record."""
        depth = "" if self.depth is None else f"_depth{self.depth}"
        return f"{self.data}_{self.form}{depth}_seed{self.seed}"

    @property
    def record(self) -> Path:
        """The file that says what was measured."""
        return RESULTS / f"{self.name}.json"


def plan() -> list[Run]:
    """All runs of the study, the most important first."""
    both = ("default", "certified_norm_gram")
    others = ("exact_sqrt", "certified_gram", "crate", "tost")
    runs = [Run("digits", form, seed) for seed in range(10) for form in both]
    runs += [Run("animals28", form, seed) for seed in range(5) for form in both]
    runs += [Run("digits", form, seed) for seed in range(3) for form in others]
    runs += [Run("digits", form, seed, depth) for seed in range(3) for depth in (8, 16) for form in both]
    runs += [Run("animals28", form, seed) for seed in range(5) for form in others]
    runs += [Run("cifar", form, 0) for form in FORMS if form not in ("crate", "tost")]
    runs += [Run("cifar", form, seed) for seed in (1, 2) for form in both]
    runs += [Run("digits", form, seed) for seed in range(3, 10) for form in others]
    return runs


@dataclass
class Options:
    """What a layer with a certificate gives and costs."""

    step: tyro.conf.Positional[Literal["train", "measure", "cost", "table"]]
    only: str = "*"
    """Names of the runs that are meant; * stands for anything."""
    list: bool = False
    """Print the names of the runs that are left, and do nothing."""
    cifar: Path | None = None
    """Folder of CIFAR-10. Default: its runs are left out."""
    animals: Path | None = None
    """Folder of animals28.npz. Default: where `cbsa data fetch` puts it."""
    runs: Path = Path("runs/certified")
    """Folder of the runs."""


def configuration(run: Run, options: Options) -> TrainConfig:
    """The recipe of the data set with the model, seed and depth of the run, one thread."""
    data = DATA[run.data]
    recipe = load_config(data.recipe)
    assert isinstance(recipe, TrainConfig)
    form = FORMS[run.form]
    args = resolved(form.args, data.head_dim)
    if run.depth is not None:
        args["depth"] = run.depth
    if run.data == "animals28" and options.animals is not None:
        recipe = replace(recipe, data=replace(recipe.data, root=str(options.animals)))
    if run.data in CIFAR:
        root = str(options.runs / f"{run.data}_subset")
        recipe = replace(
            recipe,
            data=replace(recipe.data, name="folder", root=root, shift=0.0625, val_fraction=0.1),
            optim=replace(recipe.optim, epochs=CIFAR[run.data].epochs, warmup_epochs=1, keep="last"),
        )
    return replace(
        recipe,
        output=str(options.runs / run.name),
        seed=run.seed,
        model=replace(recipe.model, name=f"{form.family}_{data.model}", args=args),
        engine=replace(recipe.engine, threads=1, tracker="none"),
    )


def resolved(args: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The arguments as the model takes them: an eps in square roots of the heads' dimension as a number."""
    eps = args.get("eps")
    if not isinstance(eps, str):
        return dict(args)
    factor = eps.removesuffix(SQRT).strip() or "1"
    return {**args, "eps": float(factor) * math.sqrt(head_dim)}


@contextmanager
def switched(form: str) -> Iterator[None]:
    """The form's switches, as long as the context is open."""
    before = {
        name: getattr(certified_ops, name) for name in FORMS[form].switches if hasattr(certified_ops, name)
    }
    try:
        for name in before:
            setattr(certified_ops, name, FORMS[form].switches[name])
        yield
    finally:
        for name, value in before.items():
            setattr(certified_ops, name, value)


def train_run(run: Run, options: Options) -> dict[str, Any]:
    """Train, evaluate and measure; the record."""
    config = configuration(run, options)
    result = train(config)
    history = RunFolder(config.output).read_metrics()
    seen = history[0]["step"] * config.optim.batch_size  # images of an epoch
    val, test = (evaluate_checkpoint(config.output, split=split) for split in ("val", "test"))
    trained = open_trained(config.output)
    return {
        "name": run.name,
        **run._asdict(),
        "model": config.model.name,
        "model_args": dict(config.model.args),
        "switches": FORMS[run.form].switches,
        "recipe": DATA[run.data].recipe,
        "epochs": config.optim.epochs,
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "best_epoch": result.best_epoch,
        "val_top1": val.top1,
        "val_images": val.images,
        "test_top1": test.top1,
        "test_loss": test.loss,
        "test_images": test.images,
        "training_minutes": sum(seen / row["images_per_second"] for row in history) / 60,
        "trained_with": environment(),
        **measure(trained, DATA[run.data].measured),
    }


def write_record(run: Run, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all."""
    write_atomically(run.record, (json.dumps(record, indent=1) + "\n").encode())


def measure_cost() -> None:
    """Time and memory of a training step of every form on its data set's images, 64 at a time, one thread.

    All forms take turns, so that a machine that slows down does so for all of them.
    """
    torch.set_num_threads(1)
    rows = []
    for name, data in DATA.items():
        forms = list(dict.fromkeys(run.form for run in plan() if run.data == name and is_there(run.form)))
        steps: dict[str, Any] = {}
        for form in forms:
            family, args, _ = FORMS[form]
            model = timm.create_model(f"{family}_{data.model}", **resolved(args, data.head_dim)).train()
            images = torch.randn(64, *model.pretrained_cfg["input_size"])
            labels = torch.randint(10, (64,))
            steps[form] = partial(training_step, form, model, images, labels)
        seconds = bench_measure.interleaved(steps, "cpu", repetitions=COST_STEPS, budget=60.0)
        for form, step in steps.items():
            step.args[1].zero_grad(set_to_none=True)
            peak = bench_measure.memory(step, "cpu").peak
            quarter = quantiles(seconds[form])
            rows.append(
                {
                    "data": name,
                    "form": form,
                    "step_ms": 1e3 * quarter[1],
                    "quartiles_ms": [1e3 * quarter[0], 1e3 * quarter[2]],
                    "peak_mib": peak / 2**20,
                }
            )
            print(rows[-1], flush=True)
    record = {"batch_size": 64, "steps": COST_STEPS, "environment": environment(), "rows": rounded(rows)}
    write_atomically(RESULTS / "cost.json", (json.dumps(record, indent=1) + "\n").encode())


def training_step(form: str, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward and backward."""
    with switched(form):
        nn.functional.cross_entropy(model(images), labels).backward()


Group = dict[tuple[str, int | None], list[dict[str, Any]]]
"""The records of one data set, by form and depth."""


def read_groups(data: str) -> Group:
    """The records of the plan that exist, in its order but forms in the order of ``FORMS``."""
    found: Group = {}
    runs = [run for run in plan() if run.data == data and run.record.exists()]
    order = list(FORMS)
    for run in sorted(runs, key=lambda run: (run.depth or 0, order.index(run.form), run.seed)):
        found.setdefault((run.form, run.depth), []).append(json.loads(run.record.read_text()))
    return found


def label(form: str, depth: int | None) -> str:
    """What a row of a table is called."""
    return f"`{form}`" if depth is None else f"`{form}`, {depth} layers"


def accuracy_table(groups: Group) -> str:
    """Accuracies, and their differences from the default form of the same depth."""
    rows = []
    for (form, depth), records in groups.items():
        test, reference = percent(records, "test_top1"), groups.get(("default", depth), [])
        loss = "" if form != "default" else "reference"
        if reference and form != "default":
            less = difference(test, percent(reference, "test_top1"))
            upper = "" if less.half is None else f" (loss at most {less.half - less.value:.2f})"
            loss = f"{less.text('+')}{upper}"
        kept = f"{records[0]['parameters']:,}"
        val = mean_of(percent(records, "val_top1")).text()
        rows.append([label(form, depth), str(len(test)), val, mean_of(test).text(), loss, kept])
    header = ["form", "seeds", "validation, %", "test, %", "difference on test, points", "parameters"]
    return markdown(header, rows)


def inside_table(groups: Group) -> str:
    """What the layers do: shares of falling rates, correlations, robustness."""
    rows = []
    for (form, depth), records in groups.items():
        row = [label(form, depth)]
        for kind in ("representatives_own", "representatives", "tokens", "stream"):
            layers = [layer[kind] for record in records for layer in record["step"]["layers"] if kind in layer]
            fell, cases = (sum(layer[key] for layer in layers) for key in ("fell", "cases"))
            row.append(f"{100 * fell / cases:.1f}" if cases else "")
        row += [guarantee_text(records), precision_text(records), tightness_text(records)]
        for key in ("W - A C", "A C"):
            values = [record["figure_6"][key] for record in records if "figure_6" in record]
            row.append(f"{fmean(values):+.2f}" if values else "")
        steps = [record["step"]["correlation"] for record in records]
        row.append(f"{fmean(steps):+.2f}" if None not in steps else "")
        for sigma in ("0.03", "0.1", "0.3"):
            row.append(f"{100 * fmean(v for record in records for v in record['robustness'][sigma]):.1f}")
        rows.append(row)
    header = ["form", "X, own eps", "X, eps 0.1", "tokens", "stream", "guarantee", "float32; bf16", "bounds"]
    header += ["Fig. 6, W - AC", "Fig. 6, AC", "own step", "noise 0.03", "noise 0.1", "noise 0.3"]
    return markdown(header, rows)


def guarantee_text(records: Sequence[dict[str, Any]]) -> str:
    """Of certified forms, in how many cases the rate fell as far as the theorem says, and the median step."""
    found = [
        layer["certificate"]
        for record in records
        for layer in record["step"]["layers"]
        if "certificate" in layer
    ]
    if not found:
        return ""
    holds, cases = (sum(each[key] for each in found) for key in ("holds", "cases"))
    step = fmean(each["fraction_quartiles"][1] for each in found)
    return f"{holds:,} of {cases:,}; {step:.2f}"


def precision_text(records: Sequence[dict[str, Any]]) -> str:
    """In which share of the cases certificates hold in float32 and under autocast, and the median steps."""
    parts = []
    for precision in ("float32", "bf16"):
        found = [record["certificates"][precision] for record in records if "certificates" in record]
        if found:
            holding, cases = (sum(each[key] for each in found) for key in ("holding", "cases"))
            share = fmean(each["share"] for each in found)
            parts.append(f"{100 * holding / cases:.1f} %, {share:.2f}")
    return "; ".join(parts)


def tightness_text(records: Sequence[dict[str, Any]]) -> str:
    """The norm in parts of each bound: medians, means over layers and records."""
    layers = [layer.get("certificate", {}) for record in records for layer in record["step"]["layers"]]
    found = [layer["tightness"] for layer in layers if "tightness" in layer]
    return "; ".join(f"{fmean(each[name] for each in found):.2f}" for name in BOUNDS) if found else ""


def rates_table(groups: Group) -> str:
    """Rates before and after, layer by layer, in nats, means over images and seeds."""
    rows = []
    for (form, depth), records in groups.items():
        for kind in ("tokens", "representatives", "stream"):
            layers = [record["step"]["layers"] for record in records]
            if kind not in layers[0][0]:
                continue
            cells = [
                " → ".join(f"{fmean(layer[kind][when] for layer in each):.1f}" for when in ("before", "after"))
                for each in zip(*layers, strict=True)
            ]
            rows.append([label(form, depth), kind, "; ".join(cells)])
    return markdown(["form", "rate of", "layers, from the first"], rows)


def cost_table() -> str:
    """What ``cost`` measured."""
    path = RESULTS / "cost.json"
    if not path.exists():
        return "Not measured."
    rows = [
        [row["data"], label(row["form"], None), f"{row['step_ms']:.1f}", f"{row['peak_mib']:.1f}"]
        for row in json.loads(path.read_text())["rows"]
    ]
    return markdown(["data", "form", "training step, ms", "peak memory of a step, MiB"], rows)


def image_error(subset: Subset) -> float:
    """Half of the 95 % interval of a difference of two accuracies near one half, in points."""
    return 196 * math.sqrt(0.5 / (10 * subset.test))


NOTES = {
    "digits": "360 test images. Recipe `digits`.",
    "animals28": "1,000 test images. Recipe `animals28`; weights of the best epoch on validation.",
    **{
        name: f"""CIFAR-10, JPEG: {subset.train} training images of each class (a tenth held out for
validation), {subset.test} test images of each, {subset.epochs} epochs, otherwise the recipe
`animals28`; weights of the last epoch. With one seed, the test images alone leave about
± {image_error(subset):.1f} points to a difference of two models (95 %, as if they erred independently)."""
        for name, subset in CIFAR.items()
    },
}
PREAMBLE = """# The certified layer beside the other forms

Written by `python -m benchmarks.certified_study table` from the records in this folder. Means over seeds
with 95 % intervals (Student's t; of differences Welch's). Without an interval: one seed. "Loss at most" is
the upper end of the interval of the loss against `default`.

*Inside*: in how many of all cases (images, layers, heads and seeds; per cent; float64) the rate was lower
after the step that the layer really takes: of the representatives X, with the weights that made them, at
the layer's own eps (1 where it has none) and at 0.1; of all tokens, in norm(x); of all tokens, in the
stream x. Guarantee: of certified steps, in how many cases the rate of X fell at least as far as the
theorem says, and the median of kappa |G| / 2, which is below 1 (mean over layers and seeds); after it what
`interpret.certificate` finds in float32 and under bf16 autocast, the share of the cases that hold and the
median, where it was measured. Bounds: the median of |G| in parts of the bound from the Gram matrix, of
|B|_1 |B|_inf, and of ((|Pi|_1 |Pi|_inf)^1/2 + |eta| |A|_F)^2; 1 is tight. Fig. 6: rank
correlation over layers and heads of the reductions of tokens and representatives in its two readings, and
for the step that the layer takes. Noise: accuracy in per cent on the measured images with noise of this
standard deviation on the parameters of the attention layers (Fig. 8), three draws."""


def write_tables() -> None:
    """Write ``table.md`` and ``figure.png`` from the records."""
    parts = [PREAMBLE]
    for data in DATA:
        groups = read_groups(data)
        if groups:
            parts += [f"## {data}", NOTES[data], accuracy_table(groups), "Inside:", inside_table(groups)]
            parts += ["Rates in nats, before → after each layer:", rates_table(groups)]
    parts += ["## Cost", "64 images, one CPU thread, forms in turn, medians.", cost_table()]
    write_atomically(RESULTS / "table.md", ("\n\n".join(parts) + "\n").encode())
    figure = draw()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    write_atomically(RESULTS / "figure.png", buffer.getvalue())
    print(f"{RESULTS / 'table.md'}, {RESULTS / 'figure.png'}")


def draw() -> Figure:
    """Test accuracy of every seed, a panel for each data set; rates of the representatives, layer by layer."""
    shown = [data for data in DATA if read_groups(data)]
    figure = Figure(figsize=(4.6 * (len(shown) + 1), 4.4), layout="constrained")
    axes = figure.subplots(1, len(shown) + 1, squeeze=False)[0]
    for axis, data in zip(axes, shown, strict=False):
        groups = {form: records for (form, depth), records in read_groups(data).items() if depth is None}
        for row, (form, records) in enumerate(groups.items()):
            values = percent(records, "test_top1")
            axis.plot(values, [row] * len(values), "o", alpha=0.5, markersize=4, color=color_of(form))
            estimate = mean_of(values)
            axis.errorbar([estimate.value], [row], xerr=estimate.half, fmt="|", color="black", capsize=3)
        axis.set_yticks(range(len(groups)), list(groups))
        axis.invert_yaxis()
        axis.set(xlabel="test accuracy, %", title=data)
    digits = read_groups("digits")
    for form in ("default", *CERTIFIED_SHOWN):
        chosen = digits.get((form, None), [])
        if chosen:
            layers = list(zip(*(record["step"]["layers"] for record in chosen), strict=True))
            for number, each in enumerate(layers):
                ends = [fmean(layer["representatives"][when] for layer in each) for when in ("before", "after")]
                name = form if number == 0 else None
                axes[-1].annotate(
                    "", (number + 1.3, ends[1]), (number + 0.7, ends[0]),
                    arrowprops={"arrowstyle": "->", "color": color_of(form), "linewidth": 1.6},
                )  # fmt: skip
                axes[-1].plot([number + 1.3], [ends[1]], linestyle="none")  # the axes make room for the arrow
                axes[-1].plot([number + 0.7], [ends[0]], "o", color=color_of(form), markersize=4, label=name)
    axes[-1].set_xticks(range(1, 5))
    axes[-1].set(xlabel="layer", ylabel="rate of the representatives, nats", title="digits: before and after")
    if digits:
        axes[-1].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure


def color_of(form: str) -> str:
    """Orange for certified forms, blue for other CBT, grey for the rest."""
    if form.startswith("certified"):
        return "#c2571a"
    return "#8a8f98" if form in ("crate", "tost") else "#2563a8" if form == "default" else "#7aa6d8"


def main() -> None:
    options = tyro.cli(Options)
    runs = [run for run in plan() if fnmatch.fnmatch(run.name, options.only)]
    if options.cifar is None:
        runs = [run for run in runs if run.data not in CIFAR]
    left = [run for run in runs if is_there(run.form) and not run.record.exists()]
    if options.list:
        print("\n".join(run.name for run in left))
    elif options.step == "train":
        if options.cifar is not None:
            for name in {run.data for run in left if run.data in CIFAR}:
                for split, count in (("train", CIFAR[name].train), ("test", CIFAR[name].test)):
                    target = options.runs / f"{name}_subset" / split
                    link_images(options.cifar / split, target, slice(count))
        for run in left:
            if not run.record.exists():
                print(f"== {run.name}", flush=True)
                with switched(run.form):
                    write_record(run, train_run(run, options))
    elif options.step == "measure":
        for run in runs:
            if is_there(run.form) and run.record.exists():
                print(f"== {run.name}", flush=True)
                record = json.loads(run.record.read_text())
                with switched(run.form):
                    trained = open_trained(options.runs / run.name)
                    write_record(run, {**record, **measure(trained, DATA[run.data].measured)})
    elif options.step == "cost":
        measure_cost()
    else:
        write_tables()


if __name__ == "__main__":
    main()
