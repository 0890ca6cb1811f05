"""The loop: one epoch of training, one pass of evaluation."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from cbsa_torch.train.config import OptimConfig
from cbsa_torch.train.data import IGNORE
from cbsa_torch.train.errors import NonFiniteLossError


class Evaluation(NamedTuple):
    """What one pass over a data set measured."""

    top1: float
    """Share of images whose most likely class is right."""
    top5: float | None
    """Share whose class is among the five most likely; None below six classes."""
    loss: float
    """Mean cross-entropy, without label smoothing."""
    images: int
    confusion: list[list[int]]
    """Counts, rows = true classes, columns = predicted."""


class EpochTraining(NamedTuple):
    """What one epoch of training measured."""

    loss: float
    """Mean of the training loss over the images of all processes."""
    lr: float
    """Learning rate of the last step."""


@contextmanager
def new_accelerator(**settings: Any) -> Iterator[Accelerator]:
    """An Accelerator with these settings, whatever an earlier run in this process used.

    Leaving the context ends its trackers. The process group stays, as it can be made only once in a process:
    see ``leave_process_group``.
    """
    AcceleratorState._reset_state(reset_partial_state=int(os.environ.get("WORLD_SIZE", "1")) == 1)
    accelerator = Accelerator(**settings)
    try:
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def leave_process_group() -> None:
    """To be called once, at the end of a process that trained or evaluated beside others.

    Without it the process may abort at its exit, while its communication threads still run.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def classification_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the images that could be read."""
    total = F.cross_entropy(
        logits, targets, label_smoothing=label_smoothing, ignore_index=IGNORE, reduction="sum"
    )
    return total / (targets != IGNORE).sum().clamp(min=1)


def train_one_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    config: OptimConfig,
    *,
    epoch: int,
    step: int,
    ema: ModelEmaV3 | None = None,
    advance: Callable[[], None] = lambda: None,
) -> tuple[EpochTraining, int]:
    """Train on every batch of ``loader`` once.

    Args:
        epoch: counted from 1; for messages.
        step: optimiser steps done before.
        advance: called after every batch (progress bar).

    Returns:
        Measurements, and the optimiser steps done by now.

    Raises:
        NonFiniteLossError: before the bad loss reaches the weights, on every process alike.
    """
    model.train()
    total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    count = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    for batch, (images, targets) in enumerate(loader):
        images, targets = images.to(accelerator.device), targets.to(accelerator.device)
        with accelerator.accumulate(model):
            scheduler.step_update(step)
            logits = model(images)
            loss = classification_loss(logits.float(), targets, config.label_smoothing)
            mean = accelerator.reduce(loss.detach(), reduction="mean")
            if not math.isfinite(mean.item()):
                raise NonFiniteLossError(f"the loss became {mean.item()} in epoch {epoch}, batch {batch + 1}")
            accelerator.backward(loss)
            if config.clip_grad is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), config.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            if ema is not None:
                ema.update(accelerator.unwrap_model(model), step=step)
        images_read = (targets != IGNORE).sum()
        total += loss.detach().double() * images_read
        count += images_read
        advance()
    total, count = accelerator.reduce(total), accelerator.reduce(count)
    return EpochTraining((total / count.clamp(min=1)).item(), optimizer.param_groups[0]["lr"]), step


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Iterable[Any],
    num_classes: int,
    advance: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure a classifier; every image counts once, whatever the number of processes."""
    model.eval()
    # Predictions are gathered below, so every process counts them all: metrics must not add up again.
    common: dict[str, Any] = {"num_classes": num_classes, "ignore_index": IGNORE, "sync_on_compute": False}
    collection: dict[str, Any] = {
        "top1": MulticlassAccuracy(average="micro", **common),
        "confusion": MulticlassConfusionMatrix(**common),
    }
    if num_classes > 5:
        collection["top5"] = MulticlassAccuracy(top_k=5, average="micro", **common)
    metrics = MetricCollection(collection, compute_groups=False).to(accelerator.device)
    loss, images_read = 0.0, 0
    for images, targets in loader:
        images, targets = images.to(accelerator.device), targets.to(accelerator.device)
        logits, targets = accelerator.gather_for_metrics((model(images).float(), targets))
        metrics.update(logits, targets)
        count = int((targets != IGNORE).sum())
        loss += classification_loss(logits, targets).item() * count
        images_read += count
        advance()
    if images_read == 0:
        return Evaluation(0.0, None, 0.0, 0, [])
    values = metrics.compute()
    return Evaluation(
        top1=values["top1"].item(),
        top5=values["top5"].item() if "top5" in values else None,
        loss=loss / images_read,
        images=images_read,
        confusion=values["confusion"].tolist(),
    )
