"""What a layer with a certificate gives and costs: train every form of the study, measure it, make the tables.

    python benchmarks/certified_study.py train --cifar DIR --animals DIR    # what is left, one run after another
    python benchmarks/certified_study.py train --only "digits_*" --list     # names of the runs that are left
    python benchmarks/certified_study.py measure --only "digits_*"          # measure trained models again
    python benchmarks/certified_study.py cost                               # time and memory of steps, on a quiet machine
    python benchmarks/certified_study.py table                              # tables and figure from the records alone

A run is a data set, a form of the model, a seed and perhaps a depth. It is trained by :func:`cbsa_torch.train.train`
on one thread by the unchanged recipe of its data set, measured, and then recorded at once in a file of its own,
``benchmarks/results/certified/NAME.json``. Records say what is left to do: the command can be stopped at any time
and goes on where it was, within a run, too.

CIFAR-10 is read from a folder (``DIR/{train,test}/CLASS/*.jpg``); the first images of every class, by name, are the
subset that is used. What is said about it is about that subset and that short recipe alone.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn

from cbsa_torch import CBSA, interpret, ops
from cbsa_torch._core.files import write_atomically
from cbsa_torch.interpret.rates import rank_correlation
from cbsa_torch.nn import TokenMixer, WhiteBoxBlock
from cbsa_torch.train import TrainConfig, evaluate_checkpoint, load_config, train
from cbsa_torch.train.data import make_loader
from cbsa_torch.train.evaluate import open_trained
from cbsa_torch.train.run.folder import RunFolder, environment
from cbsa_torch.train.tasks.base import Trained

RESULTS = Path("benchmarks/results/certified")

SQRT = "sqrt(p)"
"""As eps: the square root of the dimension of a head."""
EXACT = {"contraction": "exact", "tied": True, "orthogonal": True}

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("cbt", {}),
    "orthogonal": ("cbt", {"orthogonal": True}),
    "tied": ("cbt", {"tied": True, "orthogonal": True}),
    "exact_untied": ("cbt", {"contraction": "exact", "eps": 1.0}),
    "exact_eps1": ("cbt", {**EXACT, "eps": 1.0}),
    "exact_sqrt": ("cbt", {**EXACT, "eps": SQRT}),
    "crate": ("crate", {}),
    "tost": ("tost", {}),
}
"""Name, family of models and arguments of the mixer."""


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
}
CIFAR_IMAGES = {"train": 1500, "test": 500}
"""Images of each of the ten classes."""
CIFAR_EPOCHS = 5
SIGMAS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Standard deviations of the noise on the parameters of the attention layers (Fig. 8)."""


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
    runs = [Run("digits", "default", seed) for seed in range(5)]
    runs += [Run("cifar", form, 0) for form in ("default", "tied", "exact_eps1", "exact_sqrt")]
    runs += [Run("digits", "default", seed) for seed in range(5, 10)]
    runs += [Run("digits", form, seed) for seed in range(3) for form in ("exact_eps1", "crate", "tost")]
    runs += [Run("cifar", form, 0) for form in ("orthogonal", "exact_untied")]
    return list(dict.fromkeys(runs))


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
    family, form = FORMS[run.form]
    args = {key: math.sqrt(data.head_dim) if value == SQRT else value for key, value in form.items()}
    if run.depth is not None:
        args["depth"] = run.depth
    if run.data == "animals28" and options.animals is not None:
        recipe = replace(recipe, data=replace(recipe.data, root=str(options.animals)))
    if run.data == "cifar":
        root = str(options.runs / "cifar_subset")
        recipe = replace(
            recipe,
            data=replace(recipe.data, name="folder", root=root, shift=0.0625, val_fraction=0.1),
            optim=replace(recipe.optim, epochs=CIFAR_EPOCHS, warmup_epochs=1, keep="last"),
        )
    return replace(
        recipe,
        output=str(options.runs / run.name),
        seed=run.seed,
        model=replace(recipe.model, name=f"{family}_{data.model}", args=args),
        engine=replace(recipe.engine, threads=1, tracker="none"),
    )


def link_subset(source: Path, target: Path) -> None:
    """Make ``target`` a folder of links to the first images of every class of CIFAR-10."""
    for split, count in CIFAR_IMAGES.items():
        for folder in sorted(path for path in (source / split).iterdir() if path.is_dir()):
            own = target / split / folder.name
            own.mkdir(parents=True, exist_ok=True)
            for image in sorted(folder.iterdir())[:count]:
                link = own / image.name
                if not link.exists():
                    link.symlink_to(image.resolve())


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
        **measure(trained, run),
    }


def measure(trained: Trained, run: Run) -> dict[str, Any]:
    """Rates before and after each layer, in float64, and robustness to noise on the parameters."""
    images, labels = test_images(trained, DATA[run.data].measured)
    double = trained.model.double().eval()
    batches = images.double().split(64)
    rates = interpret.measure_rates(double, batches)
    measured: dict[str, Any] = {
        "measured_images": len(images),
        "rate": rates.coding.rate,
        "rate_normalized": rates.coding.normalized,
        "step": step_effects(double, batches),
    }
    if rates.reduced is not None:
        measured["figure_6"] = {
            "W - A C": rates.reduced.correlation,
            "W + kappa A C": rates.reduced.correlation_learned,
            "A C": rates.reduced.correlation_output,
            "W + A C": rates.reduced.correlation_added,
        }
        measured["kappa"] = rates.reduced.step_tokens
    model = trained.model.float()

    @torch.no_grad()
    def accuracy(module: nn.Module) -> float:
        return (module(images).argmax(-1) == labels).double().mean().item()

    noisy = interpret.robustness(model, accuracy, sigmas=SIGMAS)
    measured["robustness"] = {
        "clean": noisy.clean,
        **{str(s): v for s, v in zip(SIGMAS, noisy.values, strict=True)},
    }
    return {**rounded(measured), "measured_with": environment()}


def test_images(trained: Trained, count: int) -> tuple[Tensor, Tensor]:
    """Images of the test split, spread evenly over it, as the model is fed, and their classes."""
    _, dataset = trained.task.open_split(trained.spec.mode, trained.class_names, "test")
    images, labels = trained.task.sample(dataset, trained.spec, count)
    return images, torch.tensor(labels)


class Fall(NamedTuple):
    """A rate before and after a layer's step, ``(images, heads)`` each."""

    before: Tensor
    after: Tensor

    def summary(self) -> dict[str, Any]:
        """Means over images of the sum over heads, and in how many cases the rate fell."""
        return {
            "before": self.before.sum(1).mean().item(),
            "after": self.after.sum(1).mean().item(),
            "fell": int((self.after < self.before).sum()),
            "cases": self.before.numel(),
        }


def step_effects(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, Any]:
    """Rates before and after the step that each layer really takes, whatever its form.

    With z = norm1(x), the layer puts out z + attn(z): its tokens U_k^T (z + attn(z)) are compared with U_k^T z, and
    so are those of the stream, x + attn(z) with x. Representatives after the step are made from the tokens after
    it by the weights that made them before it: of CBSA with pooled first guesses W Pi + eta W A with A as it was.

    Returns:
        ``layers``: for each the summaries of ``tokens``, ``stream`` and, of CBSA, ``representatives`` (eps = 0.1, as
        in all figures) and ``representatives_own`` (the layer's own eps). ``correlation``: over layers and heads, the
        rank correlation of the reductions of tokens and representatives by this step.
    """
    seen: dict[str, list[dict[str, Fall]]] = {}
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, WhiteBoxBlock)}
    calls: dict[str, tuple[Tensor, tuple[Any, ...], Tensor]] = {}
    streams: dict[str, Tensor] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, block in blocks.items():

            def keep_stream(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                streams[name] = args[0]

            def keep_call(_: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = name) -> None:
                calls[name] = (args[0], args[1:], out)

            hooks.enter_context(block.norm1.register_forward_pre_hook(keep_stream))
            hooks.enter_context(block.attn.register_forward_hook(keep_call))
        for batch in batches:
            model(batch)
            done, calls, streams_done = dict(calls), {}, dict(streams)
            for name, (z, rest, update) in done.items():
                attn: Any = blocks[name].attn
                seen.setdefault(name, []).append(_layer_falls(attn, streams_done[name], z, update, rest))
    layers = []
    falls: dict[str, list[float]] = {"tokens": [], "representatives": []}
    for name, parts in seen.items():
        whole = {
            key: Fall(*map(torch.cat, zip(*(part[key] for part in parts), strict=True))) for key in parts[0]
        }
        layers.append({"layer": name, **{key: fall.summary() for key, fall in whole.items()}})
        for key, values in falls.items():
            if key in whole:
                values += (whole[key].before - whole[key].after).mean(0).tolist()
    reductions = falls["representatives"] and rank_correlation(falls["tokens"], falls["representatives"])
    return {"layers": layers, "correlation": reductions or None}


def _layer_falls(
    attn: TokenMixer, x: Tensor, z: Tensor, update: Tensor, rest: tuple[Any, ...]
) -> dict[str, Fall]:
    """The rates of one layer on one batch."""

    def tokens(features: Tensor) -> Tensor:
        return ops.coding_rate(attn.heads(features, *rest).queries.contiguous())

    falls = {"tokens": Fall(tokens(z), tokens(z + update)), "stream": Fall(tokens(x), tokens(x + update))}
    if not isinstance(attn, CBSA) or attn.step_representatives is None:
        return falls
    first, second = attn.stages(z, *rest), attn.stages(z + update, *rest)
    eta = attn.step_representatives[:, None, None]
    after = second.representatives + eta * (first.attention @ second.tokens)
    own = attn.eps if attn.contraction == "exact" else 1.0
    for key, eps in (("representatives", 0.1), ("representatives_own", own)):
        falls[key] = Fall(ops.coding_rate(first.extracted, eps=eps), ops.coding_rate(after, eps=eps))
    return falls


def rounded(value: Any) -> Any:
    """The same with numbers to six digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_record(run: Run, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all."""
    write_atomically(run.record, (json.dumps(record, indent=1) + "\n").encode())


def main() -> None:
    options = tyro.cli(Options)
    runs = [run for run in plan() if fnmatch.fnmatch(run.name, options.only)]
    if options.cifar is None:
        runs = [run for run in runs if run.data != "cifar"]
    left = [run for run in runs if not run.record.exists()]
    if options.list:
        print("\n".join(run.name for run in left))
    elif options.step == "train":
        if options.cifar is not None:
            link_subset(options.cifar, options.runs / "cifar_subset")
        for run in left:
            if not run.record.exists():
                print(f"== {run.name}", flush=True)
                write_record(run, train_run(run, options))
    elif options.step == "measure":
        for run in runs:
            if run.record.exists():
                print(f"== {run.name}", flush=True)
                record = json.loads(run.record.read_text())
                write_record(run, {**record, **measure(open_trained(options.runs / run.name), run)})


if __name__ == "__main__":
    main()
