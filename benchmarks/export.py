"""Exported programs: how far they are from their models, how large, and how fast beside eager code.

    python benchmarks/export.py     # seven minutes; writes benchmarks/results/export.json and export.md

Every family, adapted ViTs and a segmenter in the size "tiny", at random weights, as ONNX graphs of any size:
the difference from the model at eight sizes in ONNX Runtime and in OpenVINO (the largest difference between
outputs over the largest output; float32), the file, the graph, and milliseconds per image of one size. Eager
and compiled code run the model fused, as the graphs are.
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

from cbsa_torch._core.files import write_atomically
from cbsa_torch.bench import measure
from cbsa_torch.models import ExportReport, adapt_vit, export_model
from cbsa_torch.train.engine.console import number_table, print_table, say
from cbsa_torch.train.run.folder import environment

GRID = {"num_representatives": (8, 8)}


def family(name: str, **options: Any) -> nn.Module:
    return timm.create_model(f"{name}_tiny_patch16_224", **options)


def adapted(base: str, **options: Any) -> nn.Module:
    return adapt_vit(timm.create_model(base, dynamic_img_size=True), **options).model


def segmenter(encoder: str, **mixer_args: Any) -> nn.Module:
    return timm.create_model("segmenter", encoder=encoder, mixer_args=mixer_args)


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
}
RUNTIMES = ("eager", "compiled", "ONNX Runtime", "OpenVINO")


@dataclass
class Options:
    """Measure exported programs."""

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
    output: Path = Path("benchmarks/results/export.json")
    """And a table of the same name that ends in .md."""


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
    file = folder / "model.onnx"
    size: tuple[int, int] = options.image_size
    if hasattr(model, "patch_embed"):  # whole patches only
        size = model.patch_embed.img_size
    report = export_model(model, file, in_chans=3, image_size=size, any_size=True)
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
    milliseconds = {k: 1000 * v / options.batch for k, v in measure.medians(times).items()}
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "timed": [options.batch, 3, *size],
        "milliseconds_per_image": milliseconds,
        "quartiles": {k: [1000 * t / options.batch for t in measure.quartiles(v)] for k, v in times.items()},
        "export": report.record(),
        "openvino_errors": errors(model, runs["OpenVINO"], report),
    }


def cells_of(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    export, milliseconds = row["export"], row["milliseconds_per_image"]
    worst = max(parity["error"] for parity in export["parity"])
    differences = f"{worst:.1e}", f"{max(row['openvino_errors']):.1e}"
    size = f"{export['num_bytes'] / 2**20:.1f}", str(export["num_nodes"])
    return [row["model"], *differences, *size, *(f"{milliseconds[runtime]:.1f}" for runtime in RUNTIMES)]


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure_model(options, name, Path(folder)))
        say(" ".join(cells_of(rows[-1])))
    headings = ["model", "difference, ONNX Runtime", "OpenVINO", "MiB", "operations"]
    headings += [f"ms {runtime}" for runtime in RUNTIMES]
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
    write_atomically(options.output, json.dumps(record, indent=1).encode())
    write_atomically(options.output.with_suffix(".md"), markdown.encode())
    say(f"results: {options.output}, {options.output.with_suffix('.md')}")


if __name__ == "__main__":
    main()
