"""Measure a segmenter on whole images by windows; every image counts once, whatever the number of processes."""

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
from cbsa_torch.train.data.workers import ignore_signals_in_workers
from cbsa_torch.train.tasks.segmentation.metrics import SegmentationMetric, SegmentationScores


class Windows(NamedTuple):
    """How an image is seen."""

    size: int
    stride: int | None = None
    batch: int = 8
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


class SegmentationEvaluation(NamedTuple):
    """What one pass over a data set measured."""

    scores: SegmentationScores
    loss: float
    """Mean cross-entropy of the pixels that are not ignored."""
    images: int
    """Those with such pixels."""

    @property
    def score(self) -> float:
        """What the best epoch is chosen by."""
        return self.scores.miou


class SharedImages:
    """The images of one process, for a loop of as many rounds as the others make; the last one may be empty."""

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
    loader.generator = torch.Generator()  # workers draw their seeds from it, not from the model's
    ignore_signals_in_workers(loader)
    return SharedImages(loader, -(-count // processes), processes)


@torch.no_grad()
def measure(
    accelerator: Accelerator,
    model: nn.Module,
    images: SharedImages,
    class_names: Sequence[str],
    windows: Windows,
    advance: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
) -> SegmentationEvaluation:
    """Scores over a data set; the same on every process.

    Args:
        images: of :func:`share`, samples (image, mask) that are tensors.
        class_names: in the order of the labels.
        windows: how images are seen.
        advance: called after every image (progress bar).
        check: called before every image, equally often on every process; it may raise.
    """
    metric = SegmentationMetric(class_names, sync=images.processes > 1).to(accelerator.device)
    losses: list[tuple[float, int]] = []
    for sample in images:
        check()
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
    return SegmentationEvaluation(
        metric.compute(),
        # exact: any number of processes gives the same sum
        math.fsum(total for total, _ in losses) / max(pixels, 1),
        sum(count > 0 for _, count in losses),
    )
