"""``cbsa export``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cbsa_torch._core.files import write_atomically
from cbsa_torch.cli.options import OtherOptions, open_on, parse
from cbsa_torch.images.decode import MID_GREY
from cbsa_torch.models.export import FILES, TOLERANCE, ExportFormat, ExportReport, export_model, with_fixed_grid
from cbsa_torch.train.engine.console import number_table, print_table, say
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.tasks.base import Trained

PREPROCESSING, PARITY = "preprocessing.json", "parity.json"


@dataclass
class _ExportArgs(OtherOptions):
    """Write a trained model as a program that runs without this library.

    Beside it: preprocessing.json, what images must be made of before they go in, and the names of the classes;
    parity.json, how far the program is from the model. A program that differs is not written.
    """

    checkpoint: str = "runs/digits"
    """A run folder or a file of weights."""
    format: ExportFormat = "onnx"
    """"onnx" (model.onnx), or "torch" (model.pt2, for torch.export.load)."""
    output: str = "exported"
    """The folder to write to."""
    image_size: tuple[int, ...] = ()
    """Side, or height and width, in pixels. Default: that of the model."""
    any_size: bool = False
    """Leave height and width open: the program takes images of any size. The batch always is."""
    num_representatives: tuple[int, ...] = ()
    """Pool representatives to this grid at any aspect, e.g. 8 8. Needed with --any-size, where the model has a
    number of them."""
    tolerance: float = TOLERANCE
    """How much the program may differ from the model, relative to the largest output."""
    overwrite: bool = False
    """Replace files of these names."""


def run(args: list[str]) -> None:
    """Write a trained model as a program."""
    options = parse(_ExportArgs, args, "export")
    files = [Path(options.output) / name for name in (FILES[options.format], PREPROCESSING, PARITY)]
    there = [str(file) for file in files if file.exists()]
    if there and not options.overwrite:
        raise ConfigError(
            f"{there[0]} is there already: --overwrite replaces it, --output names another folder"
        )
    if len(options.image_size) > 2 or any(side < 1 for side in options.image_size):
        raise ConfigError(f"--image-size must be one or two positive numbers, got {options.image_size}")
    trained = open_on(options.checkpoint, options)
    if not trained.task.takes_images:
        raise ConfigError(
            f"cbsa export takes models of images, and {options.checkpoint} was trained for the task "
            f"{trained.config.task!r}: what sets of features are pooled to depends on the values of their "
            "coordinates, and a graph has no such sizes"
        )
    channels, *made_for = trained.spec.input_size
    geometry = trained.task.geometry(trained.spec)
    if "own_size" in geometry and not (options.any_size or options.image_size):
        raise ConfigError(
            f"{options.checkpoint} sees images at their own size: --any-size, or --image-size for a program of "
            "one size, to which you resize them"
        )
    if "windows" in geometry:
        made_for = [geometry["windows"]["side"]]
    size = options.image_size or tuple(made_for)
    try:
        model = trained.model
        if options.num_representatives:
            model = with_fixed_grid(model, options.num_representatives)
        report = export_model(
            model,
            files[0],
            options.format,
            in_chans=channels,
            image_size=(size[0], size[-1]),
            any_size=options.any_size,
            tolerance=options.tolerance,
        )
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot export {options.checkpoint}: {error}") from error
    record: dict[str, Any] = {"checkpoint": options.checkpoint, **report.record()}
    if options.num_representatives:
        record["num_representatives"] = options.num_representatives
        record["changed_by_num_representatives"] = _change(trained, model, size)
    write_atomically(files[1], json.dumps(preprocessing(trained, report), indent=2).encode())
    write_atomically(files[2], json.dumps(record, indent=2).encode())
    _tell(files[0], report, record.get("changed_by_num_representatives"))


def preprocessing(trained: Trained, report: ExportReport) -> dict[str, Any]:
    """What a program takes and gives, for those who run it without this library."""
    spec = trained.spec
    return {
        "task": trained.config.task,
        "class_names": trained.class_names,
        "input": {
            "name": "images",
            "layout": "NCHW",
            "dtype": "float32",
            "colours": {"L": "grey", "RGB": "RGB"}[spec.mode],
            "any_size": report.any_size,
            "height": report.image_size[0],
            "width": report.image_size[1],
            "multiple_of": report.multiple_of,
        },
        "pixels": "value / 255, less mean, over std, by channel",
        "mean": spec.mean,
        "std": spec.std,
        "decoding": {
            "orientation": "as EXIF says",
            "transparency": f"over grey {MID_GREY}",
            "16 bits": "the high byte",
        },
        "geometry": trained.task.geometry(spec._replace(input_size=(spec.input_size[0], *report.image_size))),
    }


@torch.no_grad()
def _change(trained: Trained, model: torch.nn.Module, size: tuple[int, ...]) -> float:
    """How much a fixed grid of representatives changes the outputs on images of the model's size."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, trained.spec.input_size[0], size[0], size[-1], generator=generator)
    before, after = (m.eval()(images) for m in (trained.model, model))
    return float((after - before).abs().max() / before.abs().max())


def _tell(file: Path, report: ExportReport, change: float | None) -> None:
    table = number_table("height", "width", "images", "difference", left=0)
    for parity in report.parity:
        table.add_row(str(parity.height), str(parity.width), str(parity.batch), f"{parity.error:.2g}")
    print_table(table)
    if change is not None:
        say(f"the fixed grid of representatives changes outputs by {change:.2g} of the largest at this size")
    size = f"{report.num_bytes / 2**20:.1f} MiB, {report.num_nodes} operations"
    say(f"program: {file} ({size}), {PREPROCESSING} and {PARITY} beside it")
