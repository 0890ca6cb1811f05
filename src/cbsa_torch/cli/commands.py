"""What each command does: parse its options, call the library, print."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from cbsa_torch._core.files import write_atomically
from cbsa_torch.cli.compare import run_compare
from cbsa_torch.cli.count import CURVE_TOKENS, as_dict, count_named, flops_curves, mixer_sizes
from cbsa_torch.cli.inference import run_eval, run_predict
from cbsa_torch.cli.options import at_least, parse, take_option
from cbsa_torch.cli.report import run_report
from cbsa_torch.interpret import plots
from cbsa_torch.models import registry
from cbsa_torch.models.convert import convert_official
from cbsa_torch.models.counting import LayerCounts
from cbsa_torch.train import errors
from cbsa_torch.train.registry import load_config, recipe_names
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.trainer import train

__all__ = [
    "run_compare",
    "run_convert",
    "run_count",
    "run_eval",
    "run_list",
    "run_predict",
    "run_report",
    "run_train",
]

TRAIN_USAGE = """usage: cbsa train [--config RECIPE_OR_YAML] [--model NAME] [options]

  --config  a recipe (`cbsa list`) or YAML file: the defaults that are shown below. Default: digits
  --model   short for --model.name

Later options win.
"""


def run_train(args: list[str]) -> None:
    """Train a classifier or a segmenter, as the configuration says (default: the embedded digits)."""
    source, rest = take_option("--config", args)
    model, rest = take_option("--model", rest)
    if model is not None:
        rest = ["--model.name", model, *rest]
    if source is None and "--resume" in rest:
        # A resumed run is configured by its own folder.
        output = take_option("--output", rest)[0] or load_config("digits").output
        own = RunFolder(output).config
        source = str(own) if own.exists() else None
    default = load_config("digits" if source is None else source)
    if {"-h", "--help"} & set(rest):
        print(TRAIN_USAGE)
    train(parse(type(default), rest, "train", default))


@dataclass
class _ConvertArgs:
    """Convert a released checkpoint (CBT, CRATE, ToST, hybrids) into one of ours."""

    official: str
    """A .pth, .pth.tar or .safetensors file."""
    output: str
    """The .safetensors file to write."""
    num_heads: int | None = None
    """Heads of a CRATE of a width that was not published."""


def run_convert(args: list[str]) -> None:
    """Convert a released checkpoint of the official code."""
    options = parse(_ConvertArgs, args, "convert")
    if options.num_heads is not None:
        at_least(1, num_heads=options.num_heads)
    info = convert_official(options.official, options.output, num_heads=options.num_heads)
    print(f"{options.output}: {info['model']} {info['model_args']}")


@dataclass
class _CountArgs:
    """Count parameters, FLOPs (two per multiply-add) and pairwise similarities of models, for one image.

    Similarities are the distinct inner products that decide who attends to whom.
    """

    models: tyro.conf.Positional[tuple[str, ...]]
    """timm model names; `cbsa list` shows ours."""
    image_size: tuple[int, ...] = ()
    """Side, or height and width, in pixels. Default: what each model is made for."""
    args: dict[str, str] = field(default_factory=dict)
    """Further constructor arguments, e.g. contraction exact."""
    layers: bool = False
    """Also print every layer."""
    output: str | None = None
    """Also write the counts, layers included, to this JSON file."""
    plot: str | None = None
    """Also draw the FLOPs of one layer of each mechanism against the number of tokens (.png or .svg), at the
    width and heads of the first model."""


def run_count(args: list[str]) -> None:
    """Count parameters, FLOPs and pairwise similarities of models."""
    options = parse(_CountArgs, args, "count")
    if not options.models:
        raise errors.ConfigError("no models given: cbsa count MODEL ...")
    if options.plot is not None and not options.plot.endswith((".png", ".svg")):
        raise errors.ConfigError(f"--plot must end in .png or .svg, got {options.plot}")
    _check_distinct(options.output, options.plot)
    table = Table("model", "input", "parameters", "GFLOPs", "similarities", box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    rows, remarks = [], []
    for name in options.models:
        counts, size = count_named(name, options.args, options.image_size)
        rows.append(as_dict(name, size, counts))
        for layer in counts.layers if options.layers else ():
            table.add_row(f"  {layer.name}", layer.kind, *_count_cells(layer))
        table.add_row(name, "x".join(map(str, size)), *_count_cells(counts.total))
        if counts.torch_flops != counts.total.counts.products:
            remarks.append(
                f"{name}: torch's own counter sees {counts.torch_flops / 1e9:.4g} GFLOPs of products"
            )
    Console().print(table)
    for remark in remarks:
        print(remark)
    if options.output is not None:
        write_atomically(Path(options.output), json.dumps(rows, indent=2).encode())
        print(f"counts: {options.output}")
    if options.plot is not None:
        sizes = mixer_sizes(options.models[0], options.args)
        curves = flops_curves(**sizes)
        figure = plots.flops_against_tokens(CURVE_TOKENS, curves, sizes)
        data = plots.to_png(figure) if options.plot.endswith(".png") else plots.to_svg(figure).encode()
        write_atomically(Path(options.plot), data)
        numbers = Path(options.plot).with_suffix(".json")
        write_atomically(
            numbers, json.dumps({**sizes, "tokens": CURVE_TOKENS, "flops": curves}, indent=2).encode()
        )
        print(f"plot: {options.plot}, numbers: {numbers}")


def _check_distinct(output: str | None, plot: str | None) -> None:
    """The plot also writes its numbers; neither may replace the counts."""
    if (
        output is not None
        and plot is not None
        and Path(output) in (Path(plot), Path(plot).with_suffix(".json"))
    ):
        raise errors.ConfigError(f"--output {output} is a file that --plot {plot} writes; give another name")


def _count_cells(layer: LayerCounts) -> tuple[str, str, str]:
    counts = layer.counts
    return f"{layer.parameters:,}", f"{counts.flops / 1e9:.4g}", f"{counts.similarities:,}"


@dataclass
class _ListArgs:
    """List models and recipes."""

    kind: list[Literal["models", "recipes"]] = field(default_factory=lambda: ["models", "recipes"])
    """What to list."""


def run_list(args: list[str]) -> None:
    """List our models and recipes."""
    kinds = parse(_ListArgs, args, "list").kind
    if "models" in kinds:
        for family, names in itertools.groupby(registry.names().items(), key=lambda item: item[1]):
            print(f"{family}\n  " + "\n  ".join(name for name, _ in names))
    if "recipes" in kinds:
        print("recipes: " + ", ".join(recipe_names()))
