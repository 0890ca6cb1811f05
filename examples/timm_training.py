"""Train, save and resume a model of ours with timm's parts alone: loader, optimiser, schedule, EMA, saver.

    python examples/timm_training.py --model cbt_nano_patch4_32 --epochs 4
    python examples/timm_training.py --model cbt_nano_patch4_32 --epochs 8 --resume runs/timm/last.pth.tar

Nothing here knows the model but its name; the only line for it imports ``cbsa_torch.models``, which registers
the names with timm. The images are drawn: noise that is redder or bluer. ``--data`` takes a folder with a
folder of images for each class.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import tyro
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, accuracy, dispatch_clip_grad, random_seed

import cbsa_torch.models  # noqa: F401  (registers our models with timm)


@dataclass
class Options:
    """Train with timm's parts."""

    model: str = "cbt_nano_patch4_32"
    """One of `cbsa list`."""
    data: Path | None = None
    """A folder with a folder of images for each class. Default: two classes of drawn images."""
    epochs: int = 4
    """The last epoch; the schedule does not depend on it, so that a run can go on."""
    batch_size: int = 8
    lr: float = 1e-3
    layer_decay: float = 0.9
    drop_path_rate: float = 0.1
    resume: Path | None = None
    """A checkpoint of this script to go on from."""
    output: Path = Path("runs/timm")
    seed: int = 0


def train(options: Options, data: Path) -> list[dict[str, float]]:
    """Loss and accuracy (per cent, of the averaged weights on the same images) of every epoch."""
    random_seed(options.seed)
    num_classes = sum(child.is_dir() for child in data.iterdir())
    model = timm.create_model(
        options.model, num_classes=num_classes, drop_path_rate=options.drop_path_rate, global_pool="avg"
    )
    config = resolve_data_config(model=model)
    loaders = [make_loader(data, config, options.batch_size, is_training) for is_training in (True, False)]
    optimizer = create_optimizer_v2(
        model, "adamw", lr=options.lr, weight_decay=0.05, layer_decay=options.layer_decay
    )
    scheduler, _ = create_scheduler_v2(optimizer, sched="step", decay_epochs=30, num_epochs=300)
    start = 0
    if options.resume is not None:
        start = resume_checkpoint(model, str(options.resume), optimizer)
    ema = ModelEmaV3(model, decay=0.9)
    if options.resume is not None:
        load_checkpoint(ema.module, str(options.resume), use_ema=True)
        scheduler.step(start)
    options.output.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(options.output))
    rows = []
    for epoch in range(start, options.epochs):
        random_seed(options.seed + epoch)  # the order of images is that of the epoch, also after resuming
        loss = train_epoch(model, loaders[0], optimizer, ema)
        scheduler.step(epoch + 1)
        score = validate(ema.module, loaders[1])
        saver.save_checkpoint(epoch, metric=score)
        rows.append({"epoch": epoch, "loss": loss, "accuracy": score})
    return rows


def make_loader(data: Path, config: dict[str, Any], batch_size: int, is_training: bool) -> Any:
    return create_loader(
        create_dataset("", root=str(data)),
        input_size=config["input_size"],
        mean=config["mean"],
        std=config["std"],
        batch_size=batch_size,
        is_training=is_training,
        no_aug=True,
        use_prefetcher=False,
        num_workers=0,
        device=torch.device("cpu"),
    )


def train_epoch(model: Any, loader: Any, optimizer: Any, ema: ModelEmaV3) -> float:
    model.train()
    criterion, meter = LabelSmoothingCrossEntropy(0.05), AverageMeter()
    for images, targets in loader:
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
        meter.update(loss.item(), len(images))
    return float(meter.avg)


@torch.no_grad()
def validate(model: Any, loader: Any) -> float:
    model.eval()
    meter = AverageMeter()
    for images, targets in loader:
        meter.update(accuracy(model(images), targets)[0].item(), len(images))
    return float(meter.avg)


def draw_images(folder: Path, count: int = 16, side: int = 32) -> Path:
    """Noise, redder in one class and bluer in the other."""
    rng = np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 200, (side, side, 3), dtype=np.uint8)
            pixels[..., channel] += 55
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def main() -> None:
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as drawn:
        data = draw_images(Path(drawn)) if options.data is None else options.data
        for row in train(options, data):
            print(f"epoch {row['epoch']}: loss {row['loss']:.3f}, accuracy {row['accuracy']:.1f} %")
    print(f"checkpoints in {options.output}")


if __name__ == "__main__":
    main()
