"""A segmenter measured on whole images, seen by windows: :class:`Windows`, :func:`share`, :func:`measure`.

Every image counts once, whatever the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from cbsa_torch.models.segmentation.sliding import multi_scale_logits, sliding_logits
from cbsa_torch.train.data import IGNORE
from cbsa_torch.train.data.loader import own_workers
from cbsa_torch.train.engine.accelerate import use_separate_generator
from cbsa_torch.train.tasks.segmentation.metrics import SegmentationMetric, SegmentationScores, to_record


class Windows(NamedTuple):
    """How an image is seen: square windows that cover it, averaged where they overlap."""

    size: int
    """Side in pixels."""
    stride: int | None = None
    """Pixels from one window to the next. Default: the side."""
    batch: int = 8
    """Windows in a forward pass."""
    scales: tuple[float, ...] = (1.0,)
    """Factors that the image is resized by; the mean probability counts."""
    flip: bool = False
    """Also mirrored."""

    def logits(self, model: nn.Module, image: Tensor) -> Tensor:
        """``(C, height, width)`` to ``(classes, height, width)``."""
        if self.scales == (1.0,) and not self.flip:
            return sliding_logits(model, image[None], self.size, self.stride, self.batch)[0]
        return multi_scale_logits(
            model, image[None], self.size, self.stride, self.batch, scales=self.scales, flip=self.flip
        )[0]


class SegmentationResult(NamedTuple):
    """What one pass over a data set measured."""

    scores: SegmentationScores
    loss: float
    """Mean cross-entropy of the pixels that are not ignored."""
    images: int
    """Those with such pixels."""
    windows: Windows
    """How they were seen."""

    @property
    def score(self) -> float:
        """What the best epoch is chosen by."""
        return self.scores.miou

    def record(self) -> dict[str, Any]:
        """All of it as plain values, for JSON."""
        windows = self.windows._asdict()
        return {**to_record(self.scores), "loss": self.loss, "images": self.images, "windows": windows}

    def summary(self) -> str:
        """In one line."""
        scores = self.scores
        return (
            f"mean IoU: {scores.miou:.4f}  pixel accuracy: {scores.pixel_accuracy:.4f}  "
            f"mean accuracy: {scores.mean_accuracy:.4f}  loss: {self.loss:.4f}  images: {self.images}"
        )

    def class_table(self) -> list[list[str]]:
        """IoU and accuracy in percent, and true pixels."""
        rows = [
            [name, _percent(one.iou), _percent(one.accuracy), f"{one.pixels:,}"]
            for name, one in self.scores.classes.items()
        ]
        return [["class", "IoU", "accuracy", "pixels"], *rows]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


class SharedImages:
    """The images of one process. Where others have one more, None comes last: all loop equally often."""

    def __init__(self, loader: DataLoader[Any], rounds: int, processes: int) -> None:
        self.loader, self.rounds, self.processes = loader, rounds, processes

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | None]:
        samples = iter(self.loader)
        for _ in range(self.rounds):
            yield next(samples, None)


def share(dataset: Dataset[Any], workers: int, accelerator: Accelerator) -> SharedImages:
    """Every n-th image for each of n processes.

    Sharded weights (FSDP2) are gathered in every forward pass, which all processes must then make equally
    often: as images have different numbers of windows, every process sees all of them.
    """
    processes = 1 if accelerator.is_fsdp2 else accelerator.num_processes
    count = len(dataset)  # type: ignore[arg-type]
    own = range(accelerator.process_index if processes > 1 else 0, count, processes)
    loader: DataLoader[Any] = DataLoader(Subset(dataset, own), batch_size=None, num_workers=workers)
    use_separate_generator(loader)
    own_workers(loader)
    return SharedImages(loader, -(-count // processes), processes)


@torch.no_grad()
def measure(
    accelerator: Accelerator,
    model: nn.Module,
    images: SharedImages,
    class_names: Sequence[str],
    windows: Windows,
    advance: Callable[[], None],
    before_batch: Callable[[], None],
) -> SegmentationResult:
    """Scores over a data set; the same on every process.

    Args:
        images: of :func:`share`, samples (image, mask) that are tensors.
        class_names: in the order of the labels.
        windows: how images are seen.
        advance, before_batch: of :meth:`cbsa_torch.train.tasks.base.Task.evaluate`, called for every image.
    """
    metric = SegmentationMetric(class_names, sync=images.processes > 1).to(accelerator.device)
    losses: list[tuple[float, int]] = []
    for sample in images:
        before_batch()
        if sample is not None:
            image, labels = (part.to(accelerator.device) for part in sample)
            with accelerator.autocast():
                logits = windows.logits(model, image).float()
            metric.update(logits.argmax(0), labels)
            total = F.cross_entropy(logits[None], labels[None], ignore_index=IGNORE, reduction="sum")
            losses.append((total.item(), int((labels != IGNORE).sum())))
        advance()
    if images.processes > 1:
        losses = gather_object(losses)
    pixels = sum(count for _, count in losses)
    return SegmentationResult(
        metric.compute(),
        # exact: any number of processes gives the same sum
        math.fsum(total for total, _ in losses) / max(pixels, 1),
        sum(count > 0 for _, count in losses),
        windows,
    )
