"""How a segmenter is evaluated: its scores, and the windows by which it sees whole images.

Pixels are counted in one confusion matrix over the whole data set before anything is divided (as in the
benchmarks of ADE20K and in MMSegmentation), so that images of any size add up and several processes sum to
exactly what one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchmetrics.classification import MulticlassConfusionMatrix

from cbsa_torch._core.checks import nearest
from cbsa_torch._core.modes import evaluating
from cbsa_torch.models.segmentation.sliding import multi_scale_logits, sliding_logits
from cbsa_torch.train.data import IGNORE, in_parts
from cbsa_torch.train.data.workers import ignore_signals_in_workers
from cbsa_torch.train.engine.accelerate import use_separate_generator

T = TypeVar("T")


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

    Examples:
        >>> from cbsa_torch.train.tasks.segmentation import SegmentationMetric
        >>> metric = SegmentationMetric(["ground", "cat"])
        >>> metric.update(torch.tensor([[[0, 1], [0, 1]]]), torch.tensor([[[0, 1], [1, 1]]]))
        >>> scores = metric.compute()
        >>> scores.pixel_accuracy, round(scores.classes["cat"].iou, 4)
        (0.75, 0.6667)
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
    """Mean IoU of ``measured`` over the classes that are not ``dropped``; each IoU stays what it was.

    For emoji-scenes: ``miou_without(scores, ("Flags", "Symbols"))``, whose outlines repeat between the splits.

    Raises:
        ValueError: a name that is no class.

    Examples:
        >>> from cbsa_torch.train.tasks.segmentation import SegmentationMetric, miou_without
        >>> metric = SegmentationMetric(["ground", "cat"])
        >>> metric.update(torch.tensor([[[0, 1], [0, 1]]]), torch.tensor([[[0, 1], [1, 1]]]))
        >>> miou_without(metric.compute(), ["cat"])
        0.5
    """
    for name in dropped:
        if name not in measured.classes:
            raise ValueError(
                f"dropped must be names of classes, got {name!r}{nearest(name, measured.classes)} "
                f"(there are: {', '.join(measured.classes)})"
            )
    return _mean([c.iou for name, c in measured.classes.items() if name not in dropped])


def to_record(measured: SegmentationScores) -> dict[str, Any]:
    """The scores as plain values, for JSON.

    Examples:
        >>> from cbsa_torch.train.tasks.segmentation import SegmentationMetric, to_record
        >>> metric = SegmentationMetric(["ground", "cat"])
        >>> metric.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1]]]))
        >>> to_record(metric.compute())["miou"]
        1.0
    """
    return {**measured._asdict(), "classes": {name: c._asdict() for name, c in measured.classes.items()}}


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


class Windows(NamedTuple):
    """How an image is seen: square windows that cover it, averaged where they overlap; or whole."""

    size: int | None
    """Side in pixels; None: images are seen whole, several of them in a packed batch."""
    stride: int | None = None
    """Pixels from one window to the next. Default: the side."""
    batch: int = 8
    """Windows in a forward pass."""
    scales: tuple[float, ...] = (1.0,)
    """Factors that the image is resized by; the mean probability counts."""
    flip: bool = False
    """Also mirrored."""
    max_tokens: int | None = None
    """Of whole images, tokens in a forward pass."""

    def logits(self, model: nn.Module, images: list[Tensor]) -> list[Tensor]:
        """``(C, height, width)`` each to ``(classes, height, width)``."""
        if self.size is None:
            with evaluating(model):
                found: list[Tensor] = model(images)
                return found
        if self.scales == (1.0,) and not self.flip:
            return sliding_logits(model, images, self.size, self.stride, self.batch)
        return multi_scale_logits(
            model, images, self.size, self.stride, self.batch, scales=self.scales, flip=self.flip
        )

    def parts(
        self, model: Any, items: Iterable[T], image_of: Callable[[T], Tensor | None]
    ) -> Iterator[list[T]]:
        """Items whose images :meth:`logits` is to be given together; some items may have none."""
        if self.max_tokens is None:
            return ([item] for item in items)

        def tokens(item: T) -> int:
            image, (vertical, horizontal) = image_of(item), model.strides
            if image is None:
                return 0
            patches: int = -(-image.shape[1] // vertical) * -(-image.shape[2] // horizontal)
            return patches + int(model.num_classes)

        return in_parts(items, tokens, self.max_tokens)


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

    def __init__(self, loader: DataLoader[Any], rounds: int) -> None:
        self.loader, self.rounds = loader, rounds

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | None]:
        samples = iter(self.loader)
        for _ in range(self.rounds):
            yield next(samples, None)


def share(dataset: Dataset[Any], workers: int, accelerator: Accelerator) -> SharedImages:
    """Every n-th image for each of n processes."""
    processes = sharing(accelerator)
    count = len(dataset)  # type: ignore[arg-type]
    own = range(accelerator.process_index if processes > 1 else 0, count, processes)
    loader: DataLoader[Any] = DataLoader(Subset(dataset, own), batch_size=None, num_workers=workers)
    use_separate_generator(loader)
    ignore_signals_in_workers(loader)
    return SharedImages(loader, -(-count // processes))


def sharing(accelerator: Accelerator) -> int:
    """How many processes share the images.

    Sharded weights (FSDP2) are gathered in every forward pass, which all processes must then make equally
    often: as images have different numbers of windows, every process sees all of them.
    """
    return 1 if accelerator.is_fsdp2 else accelerator.num_processes
