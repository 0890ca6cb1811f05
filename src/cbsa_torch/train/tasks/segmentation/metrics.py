"""Mean intersection over union and pixel accuracy, from one confusion matrix over all pixels of a data set.

Pixels are counted over the whole data set before anything is divided (as in the benchmarks of ADE20K and in
MMSegmentation), so that images of any size add up and several processes sum to exactly what one counts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from cbsa_torch._core.checks import nearest
from cbsa_torch.images import IGNORE


class ClassScore(NamedTuple):
    """One class."""

    iou: float | None
    """Intersection over union of true and predicted pixels; None if both are none."""
    accuracy: float | None
    """Share of its true pixels that are predicted as such; None if there are none."""
    pixels: int
    """True pixels."""


class SegmentationScores(NamedTuple):
    """What was measured over a data set; ignored pixels count nowhere."""

    miou: float
    """Mean IoU of the classes that occur in the truth or in the predictions; NaN if there are none."""
    pixel_accuracy: float
    """Share of pixels that are right; NaN if there are none."""
    mean_accuracy: float
    """Mean accuracy of the classes that occur in the truth."""
    pixels: int
    classes: dict[str, ClassScore]
    """By name, in the order of the labels."""
    confusion: list[list[int]]
    """Pixels, rows = true classes, columns = predicted."""


class SegmentationMetric(MulticlassConfusionMatrix):
    """torchmetrics' confusion matrix that computes :class:`SegmentationScores`.

    Every process updates with its own images; ``compute`` sums over the processes, as torchmetrics does. The
    counts are integers: the sum does not depend on order or number of processes.

    Args:
        class_names: in the order of the labels.
        sync: sum over the processes in ``compute``. Off where every process has seen all images.
    """

    def __init__(self, class_names: Sequence[str], *, sync: bool = True) -> None:
        super().__init__(
            num_classes=max(2, len(class_names)),  # torchmetrics takes no fewer; cut off again in compute
            ignore_index=IGNORE,
            validate_args=False,  # its check sorts every map; ours looks at the extremes
            sync_on_compute=sync,
        )
        self.class_names = list(class_names)

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Count maps of predicted and true labels.

        Args:
            predicted: (*) integers, a class each.
            labels: (*) integers, a class or ``IGNORE`` (-1) each.

        Raises:
            ValueError: shapes that differ, numbers that are no class.
        """
        if predicted.shape != labels.shape:
            raise ValueError(
                f"predicted and labels must have one shape, got {tuple(predicted.shape)} and "
                f"{tuple(labels.shape)}; predictions are labels (argmax over the classes), at the mask's size"
            )
        if predicted.is_floating_point() or labels.is_floating_point():
            raise TypeError(f"predicted and labels must be integers, got {predicted.dtype} and {labels.dtype}")
        if labels.numel() == 0:
            return
        count = len(self.class_names)
        for name, values, lowest in (("predicted", predicted, 0), ("labels", labels, IGNORE)):
            least, most = (int(value) for value in torch.aminmax(values))
            if least < lowest or most >= count:
                raise ValueError(
                    f"{name} must be in [{lowest}, {count - 1}] for {count} class(es), got {least} to {most}"
                )
        super().update(predicted, labels)

    def compute(self) -> SegmentationScores:
        """The scores of all that was counted."""
        count = len(self.class_names)
        return scores(super().compute()[:count, :count], self.class_names)


def scores(confusion: Tensor, class_names: Sequence[str]) -> SegmentationScores:
    """Scores from a confusion matrix.

    Args:
        confusion: (classes, classes) integers, rows = true classes.
        class_names: of the rows.
    """
    right = confusion.diagonal().tolist()
    true, predicted = confusion.sum(1).tolist(), confusion.sum(0).tolist()
    classes = {}
    for name, hits, is_true, is_predicted in zip(class_names, right, true, predicted, strict=True):
        union = is_true + is_predicted - hits
        classes[name] = ClassScore(
            hits / union if union else None, hits / is_true if is_true else None, is_true
        )
    return SegmentationScores(
        miou=_mean([c.iou for c in classes.values()]),
        pixel_accuracy=sum(right) / sum(true) if sum(true) else float("nan"),
        mean_accuracy=_mean([c.accuracy for c in classes.values()]),
        pixels=sum(true),
        classes=classes,
        confusion=confusion.tolist(),
    )


def miou_without(measured: SegmentationScores, dropped: Collection[str]) -> float:
    """Mean IoU over the classes that are not ``dropped``; each IoU stays what it was.

    For emoji-scenes: ``miou_without(scores, ("Flags", "Symbols"))``, whose outlines repeat between the splits.

    Raises:
        ValueError: a name that is no class.
    """
    for name in dropped:
        if name not in measured.classes:
            raise ValueError(
                f"dropped must be names of classes, got {name!r}{nearest(name, measured.classes)} "
                f"(there are: {', '.join(measured.classes)})"
            )
    return _mean([c.iou for name, c in measured.classes.items() if name not in dropped])


def to_record(measured: SegmentationScores) -> dict[str, Any]:
    """The scores as plain values, for JSON."""
    return {**measured._asdict(), "classes": {name: c._asdict() for name, c in measured.classes.items()}}


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")
