"""Ways to adapt a ViT beside each other: accuracy before and after recovery, parameters, FLOPs, speed, memory.

    python benchmarks/adapt_table.py --model runs/animals28_vit --seeds 0 1 2

Writes a .json and a .md file. Runs that are there already are kept.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from cbsa_torch._core.files import write_atomically
from cbsa_torch.bench import measure
from cbsa_torch.cli.adapt import with_data_of
from cbsa_torch.cli.options import at_least
from cbsa_torch.models.adapt import adapt_vit
from cbsa_torch.models.adapt.inherit import MIXERS, check_options
from cbsa_torch.models.adapt.vit import MixerName
from cbsa_torch.models.counting import count_model
from cbsa_torch.train.config import ModelConfig, TrainConfig
from cbsa_torch.train.data import input_spec
from cbsa_torch.train.engine.accelerate import new_accelerator
from cbsa_torch.train.errors import EXPECTED_ERRORS, ConfigError
from cbsa_torch.train.evaluate import evaluate_checkpoint
from cbsa_torch.train.free_form import read_yaml
from cbsa_torch.train.losses import DistillConfig
from cbsa_torch.train.registry import load_config
from cbsa_torch.train.run.folder import environment
from cbsa_torch.train.tasks.adaptation.stages import recover
from cbsa_torch.train.tasks.adaptation.task import (
    Adaptation,
    AdaptedModelConfig,
    AdaptTrainConfig,
    adapt_original,
    open_original,
)
from cbsa_torch.train.trainer import train

Recovery = Literal["plain", "distilled"]
CBSA_STAR = "adapted_cbsa contraction_step=1"
ORIGINAL = "original"


class Variant(NamedTuple):
    """A way to adapt: arguments of :func:`cbsa_torch.models.adapt_vit`."""

    mixer: MixerName
    layers: str | Sequence[int]
    options: Mapping[str, Any]


@dataclass
class Options:
    """What is compared, and how."""

    model: str
    """The original, as `cbsa adapt` takes it. Accuracies need one that this library trained."""
    config: str | None = None
    """A recipe or YAML file of the task adaptation. Default: the paper's recipe, with the data of the run."""
    variants: tuple[str, ...] = (CBSA_STAR, "adapted_cbsa", "agent", "linear")
    """Mixers with their options (layers is one), e.g. "adapted_cbsa broadcast=shared"."""
    recoveries: tuple[Recovery, ...] = ("plain", "distilled")
    """How accuracy is recovered: from the labels alone, or with the original as a teacher, too."""
    seeds: tuple[int, ...] = (0,)
    """Of the recoveries. None: no accuracies, costs alone."""
    epochs: int | None = None
    """Of the recoveries. Default: as configured."""
    lr: float | None = None
    """Learning rate of the recoveries. Default: as configured."""
    batch_size: int | None = None
    """Of the recoveries. Default: as configured."""
    logits: float = 1.0
    """Weight of the teacher's logits in distilled recoveries."""
    features: float = 1.0
    """Weight of the teacher's features in distilled recoveries."""
    split: Literal["val", "test"] = "test"
    """The images of the accuracies; the epoch is chosen on validation."""
    image_sizes: tuple[int, ...] = (224, 384, 1024)
    """Sides in pixels at which cost is measured. None: no costs."""
    batches: tuple[int, ...] = (8, 4, 1)
    """Images at a time, for each size."""
    cost_of: str | None = None
    """A ViT of timm whose cost is measured. Default: the original."""
    device: str = "cpu"
    """Where cost is measured."""
    threads: int = 2
    """CPU threads."""
    budget: float = 20.0
    """Seconds of timing for one variant at one size."""
    output: str = "runs/adapt_table"
    """Folder of the runs; the files are OUTPUT.json and OUTPUT.md."""


def main() -> None:
    """Measure, write, print."""
    try:
        compare(tyro.cli(Options, description=__doc__))
    except EXPECTED_ERRORS as error:
        raise SystemExit(str(error)) from None


def compare(options: Options) -> dict[str, Any]:
    """Measure and write the files; returns the record.

    Raises:
        ConfigError: options that cannot work.
    """
    variants = {text: parse_variant(text) for text in options.variants}
    if len(options.batches) < len(options.image_sizes):
        raise ConfigError("--batches must have one entry for each of --image-sizes")
    for name in ("epochs", "batch_size"):
        if getattr(options, name) is not None:
            at_least(1, **{name: getattr(options, name)})
    at_least(1, threads=options.threads)
    for name in ("image_sizes", "batches"):
        for value in getattr(options, name):
            at_least(1, **{name: value})
    if options.image_sizes:
        _check_device(options.device)
    if options.cost_of is not None:
        _check_cost_of(options.cost_of, options.image_sizes)
    _base(options)
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "options": dataclasses.asdict(options),
        "accuracy": _accuracies(options, variants) if options.seeds else [],
        "cost": costs(options, variants) if options.image_sizes else [],
    }
    write_atomically(Path(f"{options.output}.json"), (json.dumps(record, indent=1) + "\n").encode())
    write_atomically(Path(f"{options.output}.md"), markdown(record).encode())
    for rows in _tables(record):
        _show(rows)
    print(f"record: {options.output}.json, tables: {options.output}.md")
    return record


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ConfigError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None


def _check_cost_of(name: str, image_sizes: tuple[int, ...]) -> None:
    """Raise ConfigError unless timm builds it at these sizes, with attention in it."""
    try:
        for size in image_sizes:
            with torch.device("meta"):
                adapt_vit(timm.create_model(name, img_size=size), "linear", inplace=True)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"--cost-of {name} cannot be measured: {error}") from None


def parse_variant(text: str) -> Variant:
    """``"MIXER option=value ..."``.

    Raises:
        ConfigError: another form, or no such mixer.
    """
    mixer, *rest = text.split() or [""]
    pairs = [part.partition("=") for part in rest]
    if mixer not in MIXERS or not all(equals and value for _, equals, value in pairs):
        raise ConfigError(
            f"--variants must be one of {', '.join(MIXERS)} and perhaps option=value, got {text!r}"
        )
    given = {name: value for name, _, value in pairs}
    try:
        layers = AdaptedModelConfig(layers=given.pop("layers", "all")).layers_asked()
    except ConfigError as error:
        raise ConfigError(f"--variants {text!r}: {error}") from None
    try:
        values = {key: read_yaml(value, key) for key, value in given.items()}
        check_options(mixer, values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--variants {text!r}: {error}") from None
    return Variant(mixer, layers, values)  # type: ignore[arg-type]


def _configuration(
    options: Options, variant: Variant, name: str, recovery: Recovery, seed: int
) -> AdaptTrainConfig:
    base = _base(options)
    layers = variant.layers if isinstance(variant.layers, str) else ",".join(map(str, variant.layers))
    distill = DistillConfig()
    if recovery == "distilled":
        distill = dataclasses.replace(base.distill, logits=options.logits, features=options.features)
    return dataclasses.replace(
        base,
        output=f"{options.output}/{name.replace(' ', '_')}_{recovery}_seed{seed}",
        seed=seed,
        model=dataclasses.replace(
            base.model,
            original=options.model,
            mixer=variant.mixer,
            layers=layers,
            args=dict(variant.options),
        ),
        distill=distill,
    )


def _base(options: Options) -> AdaptTrainConfig:
    """What all recoveries have in common."""
    if options.config is None:
        base = with_data_of(AdaptTrainConfig(), options.model)
    else:
        base = load_config(options.config, AdaptTrainConfig.task)
        if base.model.args:
            raise ConfigError(
                f"options of mixers belong into --variants, not into model.args of {options.config}"
            )
    optim: dict[str, Any] = {"epochs": options.epochs, "lr": options.lr, "batch_size": options.batch_size}
    given = {key: value for key, value in optim.items() if value is not None}
    return dataclasses.replace(
        base,
        optim=dataclasses.replace(base.optim, **given),
        engine=dataclasses.replace(base.engine, tracker="none", threads=options.threads),
    )


def _tuned_original(options: Options, seed: int) -> Path:
    """The control run, in which the original itself is fine-tuned on the labels for as many epochs."""
    base, original = _base(options), open_original("--model", options.model)
    config = TrainConfig(
        output=f"{options.output}/{ORIGINAL}_plain_seed{seed}",
        seed=seed,
        model=ModelConfig(original.name, image_size=base.model.image_size, init_from=options.model),
        data=base.data,
        optim=base.optim,
        engine=base.engine,
    )
    return train(config).folder


def _accuracies(options: Options, variants: dict[str, Variant]) -> list[dict[str, Any]]:
    """Top-1 accuracy of the original and of every variant: before, and after each recovery with each seed."""
    rows: list[dict[str, Any]] = []
    for name, variant in variants.items():
        before = accuracy_before(
            _configuration(options, variant, name, "plain", options.seeds[0]), options.split
        )
        if not rows:
            rows.append({"name": ORIGINAL, "before": before.original})
            if "plain" in options.recoveries:
                tuned = [_tuned_original(options, seed) for seed in options.seeds]
                rows[0]["plain"] = [evaluate_checkpoint(run, split=options.split).top1 for run in tuned]
        row: dict[str, Any] = {"name": name, "before": before.adapted}
        for recovery in options.recoveries:
            row[recovery] = []
            for seed in options.seeds:
                result = recover(_configuration(options, variant, name, recovery, seed))
                row[recovery].append(evaluate_checkpoint(result.folder, split=options.split).top1)
        rows.append(row)
    return rows


class UntrainedAccuracy(NamedTuple):
    """Top-1 accuracy without training."""

    original: float
    adapted: float


def accuracy_before(config: AdaptTrainConfig, split: str) -> UntrainedAccuracy:
    """Of the original and of its adapted copy.

    Args:
        config: of the recovery.
        split: "train", "val" or "test" of its data.

    Raises:
        ConfigError: the original does not say which classes it tells apart, or the data have others.
    """
    original = open_original("model.original", str(config.model.original), config.model.image_size)
    if original.class_names is None:
        raise ConfigError(
            f"model.original {config.model.original} does not say which classes it knows: accuracy before "
            "training needs a model that was trained by this library"
        )
    accelerator, task = new_accelerator(mixed_precision="no"), Adaptation(config)
    spec, class_names = input_spec(original.model, config.model.image_size), original.class_names
    loader = task.evaluation_loader(task.open_split(spec.mode, class_names, split).dataset, spec, accelerator)

    def top1(model: nn.Module) -> float:
        return task.evaluate(accelerator, model.to(accelerator.device), loader, class_names).top1

    return UntrainedAccuracy(top1(original.model), top1(adapt_original(original, config.model).model))


def costs(options: Options, variants: dict[str, Variant]) -> list[dict[str, Any]]:
    """Inference of the original and of every variant, with random weights, on which cost does not depend.

    FLOPs are those of one image, two per multiply-add; memory is that of a batch, beyond parameters and images.
    """
    base, args = options.cost_of, {}
    if base is None:
        original = open_original("--model", options.model)
        base, args = original.name, dict(original.args)
    rows = []
    with Console().status("") as status:
        for size, batch in zip(options.image_sizes, options.batches, strict=False):
            status.update(f"{size} x {size}")
            args["img_size"] = size
            candidates: dict[str, Variant | None] = {ORIGINAL: None, **variants}
            functions = {}
            for name, variant in candidates.items():
                model = _build(base, args, variant).to(options.device).eval()
                channels = int(getattr(model, "in_chans", 3))
                images = torch.randn(batch, channels, size, size, device=options.device)
                functions[name] = partial(measure.forward, model, images)
            times = measure.interleaved(functions, options.device, repetitions=5, budget=options.budget)
            for name, seconds in times.items():
                low, median, high = measure.quartiles(seconds)
                with torch.device("meta"):  # softmax attention of a large image would not fit into memory
                    model = _build(base, args, candidates[name])
                    total = count_model(model, (channels, size, size)).total
                rows.append(
                    {
                        "name": name,
                        "image_size": size,
                        "parameters": total.parameters,
                        "flops": total.counts.flops,
                        "similarities": total.counts.similarities,
                        "images_per_second": batch / median,
                        "quartiles": (1000 * low, 1000 * high),  # milliseconds of a batch
                        "peak_mib": measure.memory(functions[name], options.device).peak / 2**20,
                    }
                )
    return rows


def _build(base: str, args: Mapping[str, Any], variant: Variant | None) -> nn.Module:
    model: nn.Module = timm.create_model(base, **args)
    if variant is None:
        return model
    return adapt_vit(model, variant.mixer, layers=variant.layers, inplace=True, **variant.options).model


def _accuracy_table(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    kinds = [key for key in (rows[-1] if rows else {}) if key not in ("name", "before")]
    yield ["", "accuracy before (%)", *(f"after, {kind} (%)" for kind in kinds)]
    for row in rows:
        yield [row["name"], f"{100 * row['before']:.1f}", *(_spread(row.get(kind)) for kind in kinds)]


def _spread(values: list[float] | None) -> str:
    """Mean ± sample standard deviation in percent; nothing where nothing was trained."""
    if not values:
        return ""
    sd = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{sd}"


def _cost_table(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    yield ["image", "", "parameters", "GFLOPs", "images/s", "over original", "peak MiB"]
    for row in rows:
        size = row["image_size"]
        own = next(r for r in rows if r["image_size"] == size and r["name"] == ORIGINAL)
        yield [
            f"{size}²",
            row["name"],
            f"{row['parameters']:,}",
            f"{row['flops'] / 1e9:.4g}",
            f"{row['images_per_second']:.3g}",
            f"{row['images_per_second'] / own['images_per_second']:.2f}",
            f"{row['peak_mib']:.3g}",
        ]


def _tables(record: dict[str, Any]) -> list[list[list[str]]]:
    """Rows of those of the two tables that were asked for."""
    tables = (list(_accuracy_table(record["accuracy"])), list(_cost_table(record["cost"])))
    return [rows for rows in tables if len(rows) > 1]


def markdown(record: dict[str, Any]) -> str:
    """The tables of a record."""
    tables = ([head, ["---"] * len(head), *body] for head, *body in _tables(record))
    return "\n".join("".join(f"| {' | '.join(line)} |\n" for line in table) for table in tables)


def _show(rows: list[list[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
