"""``cbsa bench``: time layers and models beside their baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import tyro
from rich.table import Table

from cbsa_torch._core.files import write_atomically
from cbsa_torch.bench import layers, models, plots
from cbsa_torch.interpret.plots import to_png, to_svg
from cbsa_torch.train.engine.console import PlainConsole, number_table, print_table, say
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.run.folder import environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # cbsa_torch.bench says which extra brings it

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass
class _TimedArgs:
    """How everything is timed."""

    device: str = "cpu"
    """Where: "cpu", "cuda", "cuda:1" ..."""
    dtype: Dtype = "float32"
    """Data type of weights and inputs."""
    threads: int = 2
    """CPU threads."""
    repetitions: int = 9
    """Counted calls of each candidate; fewer where the budget ends before."""
    budget: float = 10.0
    """Seconds for one candidate in one pass."""
    output: str = "benchmarks/results/layers"
    """JSON, PNG and SVG files of this name."""


@dataclass
class LayersArgs(_TimedArgs):
    """Time and memory of one attention layer of every mechanism, with a lower bound in the same run."""

    sizes: tuple[str, ...] = ("16x14", "4x32", "1x64", "1x128", "1x256")
    """Batch x side of a square grid (a class token comes on top)."""
    forward_sizes: tuple[str, ...] = ("1x512", "1x1024")
    """Further sizes, for inference only; 1x1024 is a million tokens and needs 8 GiB at 384 channels."""
    only: tuple[str, ...] = ()
    """Names of candidates. Default: all."""
    dim: int = 384
    """Channels of the layer."""
    num_heads: int = 6
    """Heads of the layer; they divide the channels."""


@dataclass
class ModelsArgs(_TimedArgs):
    """Images per second of whole models, those that can be fused for inference in this form as well."""

    models: tuple[str, ...] = models.MODELS
    """timm names; "naive_" before that of a CBT is the paper's model in plain PyTorch, "official_" the same
    with three products in ISTA, as the official code has; "nystrom_" before that of a ViT puts Nystroem
    attention into every block (package nystrom-attention). All are compared with the first."""
    sizes: tuple[str, ...] = ("8x224", "1x224", "2x512", "1x1024")
    """Images per batch x their side in pixels."""
    step_sizes: tuple[str, ...] = ("32x224",)
    """Further sizes, for training steps only."""
    compile: bool = False
    """Measure all by torch.compile as well; compiling takes up to a minute for each in every pass."""
    budget: float = 12.0
    """Seconds for one candidate in one pass."""
    output: str = "benchmarks/results/models"
    """JSON, PNG and SVG files of this name."""


USAGE = "usage: cbsa bench layers|models [options]"
KINDS = {"layers": LayersArgs, "models": ModelsArgs}


def run(args: list[str]) -> None:
    """Time layers or models beside their baselines."""
    if args and args[0] in ("-h", "--help"):
        say(f"{USAGE}: time and memory beside baselines; cbsa bench layers --help lists the options.")
        raise SystemExit(0)
    if not args or args[0] not in KINDS:
        raise ConfigError(f"{USAGE}; got {args[0]!r}" if args else USAGE)
    options: Any = tyro.cli(KINDS[args[0]], args=args[1:], prog=f"cbsa bench {args[0]}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {options.device}: torch sees no CUDA device")
    torch.set_num_threads(options.threads)
    timing: dict[str, Any] = {name: getattr(options, name) for name in ("device", "repetitions", "budget")}
    timing["dtype"] = getattr(torch, options.dtype)
    with PlainConsole().status("") as status:
        timing["progress"] = status.update
        rows, tables, figure = (_layers if args[0] == "layers" else _models)(options, timing)
    for table in tables:
        print_table(table)
        say("")
    write_atomically(Path(f"{options.output}.png"), to_png(figure))
    write_atomically(Path(f"{options.output}.svg"), to_svg(figure).encode())
    _write(options, [row._asdict() for row in rows])


def _layers(options: LayersArgs, timing: dict[str, Any]) -> tuple[Sequence[Any], list[Table], Figure]:
    unknown = set(options.only) - set(layers.CANDIDATES)
    if unknown:
        raise ConfigError(f"--only: no candidate {sorted(unknown)}; there are {', '.join(layers.CANDIDATES)}")
    rows = layers.compare(
        [layers.Size(*_size(text)) for text in options.sizes],
        forward_sizes=[layers.Size(*_size(text)) for text in options.forward_sizes],
        dim=options.dim,
        num_heads=options.num_heads,
        only=options.only or None,
        **timing,
    )
    table = number_table("tokens", "pass", "layer", "ms", "/ bound", "peak / input", "saved / input", left=3)
    last = None
    for row in rows:
        here = f"{row.batch} x {row.tokens:,}", _pass(row)
        table.add_row(
            *(here if here != last else ("", "")),
            row.name,
            f"{row.milliseconds:.2f}",
            f"{row.over_lower_bound:.2f}",
            _number(row.peak, ".2f"),
            _number(row.saved, ".2f"),
        )
        last = here
    sizes = f"{options.dim} channels, {options.num_heads} heads"
    title = f"one layer, {sizes}, {options.dtype}, {_device(options.device)}"
    return rows, [table], plots.against_tokens(rows, title)


def _models(options: ModelsArgs, timing: dict[str, Any]) -> tuple[Sequence[Any], list[Table], Figure]:
    unknown = [name for name in options.models if not models.is_known(name)]
    if unknown or not options.models:
        raise ConfigError(f"--models: no model {', '.join(unknown) or 'given'}")
    if any(name.startswith(models.NYSTROM) for name in options.models):
        if not find_spec("nystrom_attention"):
            raise ConfigError(
                "--models: those with nystrom_ need a package; pip install nystrom-attention, or leave them out"
            )
        if options.dtype != "float32":
            raise ConfigError(f"--dtype {options.dtype}: nystrom_ models run in float32 only; leave them out")
    rows = models.compare(
        options.models,
        sizes=[models.ModelSize(*_size(text)) for text in options.sizes],
        step_sizes=[models.ModelSize(*_size(text)) for text in options.step_sizes],
        compiled=options.compile,
        **timing,
    )
    headings = ("ms", "quartiles", "calls", "images/s", "/ first", "peak MiB", "saved MiB")
    table = number_table("image", "pass", "model", *headings, left=3)
    last = None
    for row in rows:
        here = f"{row.batch} x {row.image_size}", _pass(row)
        table.add_row(
            *(here if here != last else ("", "")),
            row.name,
            f"{row.milliseconds:.1f}",
            "{:.1f} {:.1f}".format(*row.quartiles),
            f"{row.repetitions}",
            f"{row.images_per_second:.2f}",
            f"{row.speedup:.2f}",
            f"{row.peak_mib:.0f}",
            _number(row.saved_mib, ".0f"),
        )
        last = here
    compared = [
        f"{'step' if training else 'forward'}: {heading}" for training, heading, *_ in models.COMPARISONS
    ]
    ratios = number_table("images/s", *compared, left=1)
    for size, values in models.ratios(rows).items():
        ratios.add_row(f"{size.batch} x {size.side}", *(_number(value, ".2f") for value in values))
    title = f"{options.dtype}, {_device(options.device)}"
    return rows, [table, ratios], plots.of_models(rows, title)


def _pass(row: layers.Row | models.ModelRow) -> str:
    return "train" if row.training else "forward"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _size(text: str) -> tuple[int, int]:
    batch, _, side = text.partition("x")
    if not (batch.isdigit() and side.isdigit() and int(batch) and int(side)):
        raise ConfigError(f"sizes must be BATCHxSIDE, as in 4x32; got {text!r}")
    return int(batch), int(side)


def _device(device: str) -> str:
    return (
        torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    )


def _write(options: _TimedArgs, rows: list[dict[str, Any]]) -> None:
    record = {"environment": environment(), "options": asdict(options), "rows": rows}
    path = Path(f"{options.output}.json")
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
    say(f"results: {path}")
