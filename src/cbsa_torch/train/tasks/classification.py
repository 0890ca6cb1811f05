"""The task of classifying images: its data, its model, its accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from cbsa_torch.train.build import build_model, draft_model
from cbsa_torch.train.config.base import RunConfig, TrainConfig, check_images
from cbsa_torch.train.data import IGNORE, input_spec, make_loader, open_splits
from cbsa_torch.train.engine.accelerator import draw_apart
from cbsa_torch.train.tasks.base import Opened


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

    @property
    def score(self) -> float:
        """What the best epoch is chosen by."""
        return self.top1


class Classification:
    """One class for every image."""

    score = "val_top1"
    score_title = "accuracy"
    hub_task, hub_metric = "image-classification", "accuracy"

    def check(self, config: RunConfig) -> None:
        """Refuse settings of the data that cannot work."""
        check_images(_own(config).data)

    def open(self, config: RunConfig, skipped: Path, *, continued: bool) -> Opened:
        """The data sets, and the model with a head for their classes."""
        draft = draft_model(config)
        splits = open_splits(_own(config).data, input_spec(draft[0]).mode, skipped)
        model, model_args = build_model(config, len(splits.class_names), draft)
        spec = input_spec(model, config.model.image_size)
        return Opened(model, model_args, splits.class_names, spec, splits.train, splits.val)

    def training_loader(self, config: RunConfig, opened: Opened, batch_size: int) -> DataLoader[Any]:
        """Augmented images in random order."""
        data = _own(config).data
        return make_loader(opened.train, opened.spec, data, batch_size, train=True, seed=config.seed)

    def validation_loader(
        self, config: RunConfig, opened: Opened, batch_size: int, accelerator: Accelerator
    ) -> Any:
        """Images in order, shared between the processes by Accelerate."""
        loader = make_loader(opened.val, opened.spec, _own(config).data, batch_size, train=False)
        draw_apart(loader)
        return accelerator.prepare(loader)

    def evaluate(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        model: nn.Module,
        loader: Any,
        class_names: Sequence[str],
        advance: Callable[[], None],
        check: Callable[[], None],
    ) -> Evaluation:
        """Accuracy and loss over the images that could be read."""
        return evaluate(accelerator, model, loader, len(class_names), advance, check=check)


def _own(config: RunConfig) -> TrainConfig:
    return cast(TrainConfig, config)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Iterable[Any],
    num_classes: int,
    advance: Callable[[], None] = lambda: None,
    *,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure a classifier; every image counts once, whatever the number of processes.

    Args:
        advance: called after every batch (progress bar).
        check: called before every batch, on every process; it may raise.
    """
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
    losses, images_read = [0.0], 0
    for images, targets in loader:
        check()
        images, targets = images.to(accelerator.device), targets.to(accelerator.device)
        logits, targets = accelerator.gather_for_metrics((model(images).float(), targets))
        metrics.update(logits, targets)
        each = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
        losses += each.tolist()
        images_read += int((targets != IGNORE).sum())
        advance()
    if images_read == 0:
        return Evaluation(0.0, None, 0.0, 0, [])
    values = metrics.compute()
    return Evaluation(
        top1=values["top1"].item(),
        top5=values["top5"].item() if "top5" in values else None,
        loss=math.fsum(losses) / images_read,  # exact: batches of any size give the same sum
        images=images_read,
        confusion=values["confusion"].tolist(),
    )
