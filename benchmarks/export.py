"""Exported programs: how far they are from their models, how large, and how fast beside eager code.

    python benchmarks/export.py                 # eight minutes; benchmarks/results/export.json and export.md
    python benchmarks/export.py --format torch  # five minutes; export_torch.json and export_torch.md

Every family, adapted ViTs, a segmenter and single layers in the size "tiny", at random weights, as programs of
any size: the difference from the model at eight sizes (the largest difference between outputs over the largest
output; float32), the file, the graph. Of ONNX graphs this is measured in ONNX Runtime and in OpenVINO, with
milliseconds per image of one size; eager and compiled code run the model fused, as the graphs are. Of models
that have no program of torch.export of any size, the reason is recorded.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import timm
import torch
import tyro
from timm.utils import reparameterize_model
from torch import Tensor, nn

from cbsa_torch import CBSA, AgentAttention, CBSABlock
from cbsa_torch._core.files import write_atomically
from cbsa_torch.bench import measure
from cbsa_torch.models import ExportError, ExportReport, adapt_vit, export_model
from cbsa_torch.models.export import FILES, ExportFormat
from cbsa_torch.train.engine.console import number_table, print_table, say
from cbsa_torch.train.run.folder import environment

GRID = {"num_representatives": (8, 8)}


def family(name: str, **options: Any) -> nn.Module:
    return timm.create_model(f"{name}_tiny_patch16_224", **options)


def adapted(base: str, **options: Any) -> nn.Module:
    return adapt_vit(timm.create_model(base, dynamic_img_size=True), **options).model


def segmenter(encoder: str, **mixer_args: Any) -> nn.Module:
    return timm.create_model("segmenter", encoder=encoder, mixer_args=mixer_args)


def layer(mixer: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """One layer of "tiny" on patches of 16 x 16 pixels."""
    return nn.Sequential(nn.Conv2d(3, 192, 16, 16), mixer(192, 3, **options))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "cbt": partial(family, "cbt", **GRID),
    "cbt, exact contraction": partial(family, "cbt", contraction="exact", **GRID),
    "cbt, certified": partial(family, "cbt", step="certified", **GRID),
    "linear_cbt": partial(family, "linear_cbt"),
    "crate": partial(family, "crate"),
    "crate_cbt": partial(family, "crate_cbt", **GRID),
    "tost": partial(family, "tost"),
    "agent": partial(family, "agent", **GRID),
    "stem_vit": partial(family, "stem_vit"),
    "crate_original": partial(family, "crate_original"),
    "adapted vit": partial(adapted, "vit_tiny_patch16_224", contraction_step=0.5, **GRID),
    "adapted eva02": partial(adapted, "eva02_tiny_patch14_224", contraction_step=0.5, **GRID),
    "segmenter of a vit": partial(segmenter, "vit_tiny_patch16_224", num_representatives=(10, 10)),
    "layer CBSA": partial(layer, CBSA, **GRID),
    "layer AgentAttention": partial(layer, AgentAttention, **GRID),
    "layer CBSABlock": partial(layer, CBSABlock, **GRID),
}
RUNTIMES = ("eager", "compiled", "ONNX Runtime", "OpenVINO")


@dataclass
class Options:
    """Measure exported programs."""

    format: ExportFormat = "onnx"
    models: tuple[str, ...] = tuple(MODELS)
    image_size: tuple[int, int] = (224, 224)
    """Height and width of the images that are timed."""
    batch: int = 1
    repetitions: int = 21
    budget: float = 10.0
    """Seconds for the calls of one runtime."""
    threads: int = 2
    """CPU threads."""
    seed: int = 0
    output: Path | None = None
    """And a table of the same name that ends in .md. Default: benchmarks/results/export.json, or
    export_torch.json."""


def open_onnx(file: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """The program in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def open_openvino(file: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """The program in OpenVINO, which computes in bfloat16 where the processor has it unless it is told."""
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    program = openvino.Core().compile_model(file, "CPU", settings)
    return lambda images: torch.from_numpy(program([images.numpy()])[0])


@torch.no_grad()
def errors(model: nn.Module, run: Callable[[Tensor], Tensor], report: ExportReport) -> list[float]:
    """How far a runtime is from the model on the batches of a report's sizes."""
    found = []
    generator = torch.Generator().manual_seed(1)
    for parity in report.parity:
        images = torch.randn(parity.batch, 3, parity.height, parity.width, generator=generator)
        expected = model(images)
        found.append(float((run(images) - expected).abs().max() / expected.abs().max()))
    return found


def timed_alone(call: Callable[[], Any], repetitions: int, budget: float) -> list[float]:
    """Seconds of each call. Not in turn with other runtimes: threads of ONNX Runtime go on waiting for work in
    a loop after a call, and take the processor from the next one.
    """
    time.sleep(1)
    return measure.interleaved({"": call}, "cpu", repetitions=repetitions, budget=budget)[""]


def measure_model(options: Options, name: str, folder: Path) -> dict[str, Any]:
    """Everything of one model."""
    torch.manual_seed(options.seed)
    model: Any = MODELS[name]().eval()
    file = folder / FILES[options.format]
    size: tuple[int, int] = options.image_size
    if hasattr(model, "patch_embed"):  # whole patches only
        size = model.patch_embed.img_size
    row = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
    try:
        report = export_model(model, file, options.format, in_chans=3, image_size=size, any_size=True)
    except ExportError as error:
        return {**row, "refused": str(error)}
    row["export"] = report.record()
    return row if options.format == "torch" else row | measure_runtimes(options, model, file, size, report)


def measure_runtimes(
    options: Options, model: nn.Module, file: Path, size: tuple[int, int], report: ExportReport
) -> dict[str, Any]:
    """A graph in two runtimes beside eager and compiled code."""
    fused: nn.Module = reparameterize_model(model).eval()
    compiled: Any = torch.compile(fused)
    torch.compiler.reset()
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "eager": partial(measure.forward, fused),
        "compiled": partial(measure.forward, compiled),
        "ONNX Runtime": open_onnx(file, options.threads),
        "OpenVINO": open_openvino(file, options.threads),
    }
    images = torch.randn(options.batch, 3, *size)
    for run in runs.values():
        run(images)  # compiling is no part of any time
    times = {
        runtime: timed_alone(partial(run, images), options.repetitions, options.budget)
        for runtime, run in runs.items()
    }
    return {
        "timed": [options.batch, 3, *size],
        "milliseconds_per_image": {k: 1000 * v / options.batch for k, v in measure.medians(times).items()},
        "quartiles": {k: [1000 * t / options.batch for t in measure.quartiles(v)] for k, v in times.items()},
        "openvino_errors": errors(model, runs["OpenVINO"], report),
    }


HEADINGS = {
    "onnx": ["model", "difference, ONNX Runtime", "OpenVINO", "MiB", "operations"]
    + [f"ms {runtime}" for runtime in RUNTIMES],
    "torch": ["model", "difference", "MiB", "operations"],
}


def cells_of(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    if "refused" in row:
        return [row["model"], "refused", "", ""]
    export = row["export"]
    worst = max(parity["error"] for parity in export["parity"])
    cells = [row["model"], f"{worst:.1e}"]
    if "openvino_errors" in row:
        cells.append(f"{max(row['openvino_errors']):.1e}")
    cells += [f"{export['num_bytes'] / 2**20:.1f}", str(export["num_nodes"])]
    milliseconds = row.get("milliseconds_per_image", {})
    return cells + [f"{milliseconds[runtime]:.1f}" for runtime in RUNTIMES if runtime in milliseconds]


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure_model(options, name, Path(folder)))
        say(" ".join(cells_of(rows[-1])))
    headings = HEADINGS[options.format]
    table = number_table(*headings, left=1)
    for row in rows:
        table.add_row(*cells_of(row))
    print_table(table)
    lines = [headings, ["---"] * len(headings), *map(cells_of, rows)]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    versions = {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__}
    record = {
        "environment": {**environment(), **versions},
        "options": {key: str(value) for key, value in vars(options).items()},
        "rows": rows,
    }
    output = options.output or Path(
        f"benchmarks/results/export{'_torch' if options.format == 'torch' else ''}.json"
    )
    write_atomically(output, json.dumps(record, indent=1).encode())
    write_atomically(output.with_suffix(".md"), markdown.encode())
    say(f"results: {output}, {output.with_suffix('.md')}")


if __name__ == "__main__":
    main()
