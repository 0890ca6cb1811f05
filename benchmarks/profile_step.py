"""Where the time of one training step goes, and what the settings that make it faster save.

    python benchmarks/profile_step.py [--device cuda] [--models cbt_nano_patch4_28] [--compile]

First every setting is timed without a profiler, all in turn: the whole step, and the piece it changes. Then one
step before and one after is taken apart by torch.profiler: each operation counts for the part of the model it
was called in, its backward for the part whose forward made it. Images are read and augmented in the training
process, so that waiting for them shows.

Results go to ``benchmarks/results/profile_step.json`` and ``.md``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import tyro
from PIL import Image
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import cbsa_torch.models  # noqa: F401  (registers our models with timm)
from cbsa_torch.bench.measure import interleaved
from cbsa_torch.models import registry
from cbsa_torch.train import TrainConfig, load_config
from cbsa_torch.train.config import DataConfig, OptimConfig
from cbsa_torch.train.data import input_spec, make_loader, open_splits
from cbsa_torch.train.data.checked_images import PlainImages
from cbsa_torch.train.engine.accelerate import to_channels_last
from cbsa_torch.train.engine.optim import has_fused, make_optimizer
from cbsa_torch.train.losses import mean_loss
from cbsa_torch.train.run.folder import environment

RESULTS = Path("benchmarks/results/profile_step.json")
MARK = "part/"
NODE = "autograd::engine::evaluate_function: "
PARTS = (
    "data",
    "stem",
    "attention",
    "feed-forward",
    "norms, residuals, positions",
    "head and loss",
    "optimiser",
    "other",
)


@dataclass
class Options:
    """Profile one training step."""

    models: tuple[str, ...] = ("cbt_nano_patch4_28", "cbt_small_patch16_224")
    """The first as in the recipe animals28, with its data; others on generated photos of 500 x 375 pixels."""
    device: str = "cpu"
    batch_nano: int = 64
    batch_224: int = 8
    repetitions: int = 10
    budget: float = 30.0
    """Seconds for the timed steps of one setting."""
    threads: int = 1
    compile: bool = False
    """Also time torch.compile."""
    note: str = ""
    """About the machine, for the table."""
    output: Path = RESULTS


@dataclass
class Setting:
    """How a step is computed."""

    optimizer: str
    fused: bool = False
    channels_last: bool = False
    compile: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        extras = [k for k in ("fused", "channels_last", "compile") if getattr(self, k)]
        return " + ".join([self.optimizer, *extras]).replace("_", "-")


class Step:
    """One training step: forward, backward, optimiser, on a batch of the loader or on a fixed one."""

    def __init__(self, model: str, setting: Setting, batches: Iterator[Any], device: str, marked: bool) -> None:
        torch.manual_seed(0)
        self.model = timm.create_model(model).to(device).train()
        if setting.channels_last:
            to_channels_last(self.model)
        self.optimizer = make_optimizer(self.model, OptimConfig(name=setting.optimizer, lr=1e-5))
        for group in self.optimizer.param_groups:
            if "fused" in group:
                group["fused"] = setting.fused
        self.batches, self.device = batches, device
        self.fixed = next(batches)
        if marked:
            mark_parts(self.model)
        if setting.compile:
            self.model.compile()

    def on_fixed_batch(self) -> None:
        """Without the time of the data."""
        self._train(*self.fixed)

    def on_next_batch(self) -> None:
        """With the time of the data."""
        with record_function(MARK + "data"):
            batch = next(self.batches)
        self._train(*batch)

    def _train(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        with record_function(MARK + "data"):
            images, targets = images.to(self.device), targets.to(self.device)
        logits = self.model(images)
        with record_function(MARK + "head and loss"):
            loss = mean_loss(logits.float(), targets, 0.1)
        loss.backward()
        with record_function(MARK + "optimiser"):
            self.optimizer.step()
            self.optimizer.zero_grad()


def mark_parts(model: nn.Module) -> None:
    """Let the profiler see in which part of the model an operation was called."""

    def mark(module: nn.Module, part: str) -> None:
        opened: list[Any] = []

        def enter(*_: Any) -> None:
            opened.append(record_function(MARK + part))
            opened[-1].__enter__()

        def leave(*_: Any) -> None:
            opened.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    mark(model, "norms, residuals, positions")
    mark(model.stem, "stem")  # type: ignore[arg-type]
    mark(model.head, "head and loss")  # type: ignore[arg-type]
    for block in model.blocks:  # type: ignore[union-attr]
        mark(block.attn, "attention")
        mark(getattr(block, "ista", None) or block.mlp, "feed-forward")


def take_apart(step: Callable[[], None], device: str) -> dict[str, dict[str, float]]:
    """Milliseconds of one step by part: forward (with data and optimiser), backward."""
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as recorded:
        step()
    events: list[Any] = [e for e in recorded.events() or [] if e.device_type.name == "CPU"]
    # A node of the graph bears the number of the operation that made it; of several the innermost, latest one.
    maker: dict[int, str] = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        part, backward = _home(event)
        if not backward and event.sequence_nr >= 0 and event.scope == 0:
            maker[event.sequence_nr] = part
    times: dict[str, dict[str, float]] = {part: defaultdict(float) for part in PARTS}
    for event in events:
        spent = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
        part, backward = _home(event)
        if backward:
            part = maker.get(_number(event), "other")
        times[part]["backward" if backward else "forward"] += spent
    return {part: {"forward": t["forward"], "backward": t["backward"]} for part, t in times.items()}


def _home(event: Any) -> tuple[str, bool]:
    """The part an operation was called in, and whether it belongs to the backward pass."""
    while event is not None:
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK), False
        if event.name.startswith(NODE):
            return "other", True
        event = event.cpu_parent
    return "other", False


def _number(event: Any) -> int:
    while not event.name.startswith(NODE):
        event = event.cpu_parent
    return int(event.sequence_nr)


def batches_of(model: str, batch_size: int, folder: Path) -> tuple[Iterator[Any], str]:
    """Batches without end, read in this process, and what they are."""
    if model.endswith("_28"):
        recipe = load_config("animals28")
        assert isinstance(recipe, TrainConfig)
        data, what = recipe.data, "animals28, as in its recipe"
    else:
        for i in range(32):
            target = folder / "train" / f"class{i % 2}" / f"{i}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            coarse = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(target, quality=90)
        data, what = DataConfig(name="folder", root=str(folder)), "generated JPEG files of 500 x 375 pixels"
    data.workers = 0
    net = timm.create_model(model)
    spec = input_spec(net)
    train: Any = open_splits(data, spec.mode, folder / "skipped.txt").train
    train = PlainImages(train, indices=list(range(min(len(train), 20 * batch_size))))
    loader = make_loader(train, spec, data, batch_size, train=True)

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    return endless(), what


def profile_model(model: str, options: Options) -> dict[str, Any]:
    batch_size = options.batch_nano if model.endswith("_28") else options.batch_224
    settings = [Setting("lion"), Setting("lion", channels_last=True), Setting("adamw")]
    settings += [Setting("adamw", fused=True), Setting("adamw", fused=True, channels_last=True)]
    if options.compile:
        settings.append(Setting("adamw", fused=True, channels_last=True, compile=True))
    with tempfile.TemporaryDirectory() as name:
        batches, what = batches_of(model, batch_size, Path(name))
        steps = {s.name: Step(model, s, batches, options.device, False) for s in settings}
        for step in steps.values():
            step.on_fixed_batch()  # compiles, and makes the optimiser's state
        timed = interleaved(
            {name: step.on_fixed_batch for name, step in steps.items()},
            options.device,
            repetitions=options.repetitions,
            budget=options.budget,
        )
        pieces = time_pieces(steps, options)
        del steps
        marked = {
            title: Step(model, setting, batches, options.device, True)
            for title, setting in (("before", Setting("adamw")), ("after", settings[4]))
        }
        for step in (*marked.values(), *marked.values()):
            step.on_next_batch()
        taken: dict[str, list[Any]] = {title: [] for title in marked}
        for _ in range(5):  # in turn, so that a drifting machine drifts for both
            for title, step in marked.items():
                taken[title].append(take_apart(step.on_next_batch, options.device))
        parts = {
            title: {
                part: {p: statistics.median(t[part][p] for t in times) for p in ("forward", "backward")}
                for part in PARTS
            }
            for title, times in taken.items()
        }
    return {
        "model": model,
        "batch_size": batch_size,
        "data": f"{what}; read in the training process",
        "step_ms": in_ms(timed),
        "piece_ms": in_ms(pieces),
        "settings": {"before": "adamw", "after": settings[4].name},
        "parts_ms": parts,
    }


def time_pieces(steps: dict[str, Step], options: Options) -> dict[str, list[float]]:
    """Seconds of what the settings change, alone: the optimisers' steps, and the stem forward and backward."""

    def stem(step: Step) -> Callable[[], None]:
        def run() -> None:
            tokens = step.model.stem(step.fixed[0].to(step.device)).flatten(2).transpose(1, 2).contiguous()
            tokens.sum().backward()

        return run

    names = ("lion", "adamw", "adamw + fused")
    for name in names:
        for parameter in steps[name].model.parameters():
            parameter.grad = torch.randn_like(parameter)
    pieces: dict[str, Callable[[], Any]] = {f"optimiser: {name}": steps[name].optimizer.step for name in names}
    pieces["stem"] = stem(steps["lion"])
    pieces["stem: channels-last"] = stem(steps["lion + channels-last"])
    return interleaved(pieces, options.device, repetitions=4 * options.repetitions, budget=options.budget)


def in_ms(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {
        name: {"median": 1e3 * statistics.median(t), "fastest": 1e3 * min(t), "times": len(t)}
        for name, t in times.items()
    }


def markdown(record: dict[str, Any]) -> str:
    machine = record["environment"]
    lines = [
        "# One training step",
        "",
        f"{machine['date'][:10]}, {record['device']} ({machine['device']}), {machine['threads']} thread(s), "
        f"torch {machine['torch']}, timm {machine['timm']}, cbsa_torch {machine['cbsa_torch']}. Written by "
        "`python benchmarks/profile_step.py`.",
        *([record["note"]] if record["note"] else []),
    ]
    for result in record["models"]:
        lines += ["", f"## {result['model']}, batch {result['batch_size']}", "", f"Data: {result['data']}."]
        for what in ("step", "piece"):
            lines += ["", f"| {what} | median ms | fastest ms | times |", "|---|---|---|---|"]
            for name, t in result[f"{what}_ms"].items():
                lines.append(f"| {name} | {t['median']:.2f} | {t['fastest']:.2f} | {t['times']} |")
            if what == "step":
                lines += ["", compared(result["step_ms"])]
        apart, names = result["parts_ms"], result["settings"]
        titles = ("before", "after")
        totals = [sum(sum(t.values()) for t in apart[title].values()) for title in titles]
        # A table is a step with its data, under the profiler, which takes time itself.
        lines += [
            "",
            f"Where it goes, in ms under the profiler, with data: before ({names['before']}), "
            f"after ({names['after']}).",
            "",
            "| part | forward, before | backward, before | share | forward, after | backward, after | share |",
            "|---|---|---|---|---|---|---|",
        ]
        for part in PARTS:
            cells = []
            for title, total in zip(titles, totals, strict=True):
                t = apart[title][part]
                cells += [
                    f"{t['forward']:.1f}",
                    f"{t['backward']:.1f}",
                    f"{100 * sum(t.values()) / total:.1f} %",
                ]
            lines.append(f"| {part} | {' | '.join(cells)} |")
        lines.append(f"| all | | | {totals[0]:.1f} ms | | | {totals[1]:.1f} ms |")
    return "\n".join(lines) + "\n"


def compared(steps: dict[str, dict[str, float]]) -> str:
    """What the settings change of the whole step, beside how much the times of one setting differ."""
    changes = []
    for name, times in steps.items():
        optimizer = name.split(" + ")[0]
        if name != optimizer:
            change = times["fastest"] / steps[optimizer]["fastest"] - 1
            changes.append(f"{name} {100 * change:+.0f} % beside {optimizer}")
    spread = [100 * (times["median"] / times["fastest"] - 1) for times in steps.values()]
    return (
        f"Fastest steps: {'; '.join(changes)}. The median of one setting is {min(spread):.0f} to "
        f"{max(spread):.0f} % above its fastest: a smaller change than that is not shown to be one."
    )


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    for model in options.models:
        if model not in registry.names():
            raise SystemExit(f"--models must be of ours (cbsa list), got {model!r}")
    assert has_fused("adamw")
    record = {
        "environment": environment(),
        "device": options.device,
        "note": options.note,
        "models": [profile_model(model, options) for model in options.models],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    text = markdown(record)
    options.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
