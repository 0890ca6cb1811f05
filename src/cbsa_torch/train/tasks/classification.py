"""The task of classifying images: its data, its model, its accuracy, its predictions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from cbsa_torch.train.build import build_model, draft_model
from cbsa_torch.train.config import TrainConfig, check_image_settings
from cbsa_torch.train.data import (
    IGNORE,
    InputSpec,
    NativeSize,
    OpenedSplit,
    Splits,
    describe,
    in_parts,
    input_spec,
    make_loader,
    make_native_loader,
    native_size,
    native_transform,
    open_split,
    open_splits,
)
from cbsa_torch.train.engine.accelerate import use_separate_generator
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.tasks.base import (
    PredictOptions,
    Task,
    TaskSetup,
    Trained,
    WindowOptions,
    eval_transform,
    read_images,
    spread_indices,
)

EVALUATION_BATCH = 256
"""Images in a forward pass of an evaluation, unless it is told otherwise."""
NATIVE_EVALUATION_BATCH = 32
"""Images that are read at a time where they keep their size."""
TOP = 5
"""How many classes a prediction names, unless it is told otherwise."""


class ClassificationResult(NamedTuple):
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

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return self._asdict()

    def summary(self) -> str:
        """In one line."""
        top5 = "" if self.top5 is None else f"  top-5: {self.top5:.4f}"
        return f"accuracy: {self.top1:.4f}{top5}  loss: {self.loss:.4f}  images: {self.images}"

    def class_table(self) -> list[list[str]]:
        """Nothing by class."""
        return []


class ClassPrediction(NamedTuple):
    """The most likely classes of one image, or why it could not be read."""

    image: str
    classes: list[str]
    probabilities: list[float]
    error: str | None = None

    def class_shares(self) -> list[tuple[str, float]]:
        """Classes and probabilities, the largest first."""
        return list(zip(self.classes, self.probabilities, strict=True))


class Classification(Task):
    """One class for every image."""

    config: TrainConfig
    score = "val_top1"
    score_title = "accuracy"
    hub_task, hub_metric = "image-classification", "accuracy"
    share_title = "probability"
    one_class_per_image = True
    data_name_elsewhere = "folder"
    unused_options = frozenset({"window", "stride", "scales", "flip", "masks", "maps", "overwrite"})

    def check(self) -> None:
        """Refuse settings of the data that cannot work."""
        check_image_settings(self.config.data)

    def with_native(self, changes: Mapping[str, Any]) -> Task:
        """The same task with these settings of its data."""
        data = dataclasses.replace(self.config.data, **changes)
        self.check_native(data.native, changes)
        return self.with_data(data)

    def open_data(self, mode: str, skipped: Path) -> Splits:
        """Splits of (image, label)."""
        return open_splits(self.config.data, mode, skipped)

    def open(self, skipped: Path, *, continued: bool) -> TaskSetup:
        """The data sets, and the model with a head for their classes."""
        config = self.config
        draft = draft_model(config)
        splits = self.open_data(input_spec(draft.model).mode, skipped)
        model, args, notes = build_model(config, len(splits.class_names), draft)
        spec = input_spec(model, config.model.image_size)
        data = splits.class_names, spec, splits.train, splits.val
        return TaskSetup(model, args, *data, notes=[*describe(splits), *notes])

    def training_loader(self, setup: TaskSetup, batch_size: int) -> DataLoader[Any]:
        """Augmented images in random order."""
        data, seed = self.config.data, self.config.seed
        if data.native:
            return make_native_loader(setup.train, setup.spec, data, batch_size, seed=seed)
        return make_loader(setup.train, setup.spec, data, batch_size, train=True, seed=seed)

    def open_split(
        self, mode: str, class_names: list[str], split: str | None, skipped: Path | None = None
    ) -> OpenedSplit:
        """A split of (image, label)."""
        return open_split(self.config.data, mode, split, class_names, skipped)

    def evaluation_loader(
        self, dataset: Dataset[Any], spec: InputSpec, accelerator: Accelerator, batch_size: int | None = None
    ) -> Any:
        """Images in order, shared between the processes by Accelerate."""
        default = NATIVE_EVALUATION_BATCH if self.config.data.native else EVALUATION_BATCH
        size = default if batch_size is None else batch_size
        loader = make_loader(dataset, spec, self.config.data, size, train=False)
        use_separate_generator(loader)
        return accelerator.prepare(loader)

    @torch.no_grad()
    def evaluate(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        batches: Iterable[Any],
        class_names: Sequence[str],
        *,
        windows: WindowOptions | None = None,
        batch_size: int | None = None,
    ) -> ClassificationResult:
        """Accuracy and loss over the images that could be read."""
        if windows is not None:
            self.check_options(windows)
        model.eval()
        # Predictions are gathered below, so every process counts them all: metrics must not add up again.
        common: dict[str, Any] = {
            "num_classes": len(class_names),
            "ignore_index": IGNORE,
            "sync_on_compute": False,
        }
        collection: dict[str, Any] = {
            "top1": MulticlassAccuracy(average="micro", **common),
            "confusion": MulticlassConfusionMatrix(**common),
        }
        if len(class_names) > 5:
            collection["top5"] = MulticlassAccuracy(top_k=5, average="micro", **common)
        metrics = MetricCollection(collection, compute_groups=False).to(accelerator.device)
        losses, images_read = [0.0], 0
        for images, targets in batches:
            images, targets = send_to_device((images, targets), accelerator.device)
            logits, targets = accelerator.gather_for_metrics((self._logits(model, images).float(), targets))
            metrics.update(logits, targets)
            each = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
            losses += each.tolist()
            images_read += int((targets != IGNORE).sum())
        if images_read == 0:
            return ClassificationResult(0.0, None, 0.0, 0, [])
        values = metrics.compute()
        return ClassificationResult(
            top1=values["top1"].item(),
            top5=values["top5"].item() if "top5" in values else None,
            loss=math.fsum(losses) / images_read,  # exact: batches of any size give the same sum
            images=images_read,
            confusion=values["confusion"].tolist(),
        )

    def _logits(self, model: nn.Module, images: Tensor | list[Tensor]) -> Tensor:
        """Of a batch, or of a list of images of any sizes, some at a time."""
        if isinstance(images, Tensor):
            logits: Tensor = model(images)
            return logits
        bare: Any = model
        size = NativeSize(bare.stem.patch_size)
        parts = in_parts(images, lambda image: _tokens(size, image), self.config.data.max_tokens)
        return torch.cat([model(part) for part in parts])

    @torch.inference_mode()
    def predict(
        self, trained: Trained, images: Sequence[str | Path], options: PredictOptions
    ) -> list[ClassPrediction]:
        """The ``top`` most likely classes of each image."""
        self.check_options(options)
        top = TOP if options.top is None else options.top
        if top < 1:
            raise ConfigError(f"top must be at least 1, got {top}")
        device, transform = next(trained.model.parameters()).device, eval_transform(trained.spec)
        data = self.config.data
        if data.native:
            transform = native_transform(transform, trained.spec, data, train=False)
        items = (
            (path, image if isinstance(image, str) else transform(image).to(device))
            for path, image in read_images(images, trained.spec.mode, options.on_bad_image)
        )
        parts: Iterable[list[tuple[Path, Any]]] = ([item] for item in items)
        if data.native and trained.spec.patch_size is not None:
            size = NativeSize(trained.spec.patch_size)
            parts = in_parts(items, lambda item: _tokens(size, item[1]), data.max_tokens)
        predictions = []
        for part in parts:
            pixels = [seen for _, seen in part if isinstance(seen, Tensor)]
            logits = trained.model(pixels if data.native else torch.stack(pixels)) if pixels else []
            found = iter(logits)
            for path, seen in part:
                if isinstance(seen, str):
                    predictions.append(ClassPrediction(str(path), [], [], seen))
                    continue
                best = next(found).softmax(-1).topk(min(top, len(trained.class_names)))
                names = [trained.class_names[i] for i in best.indices.tolist()]
                predictions.append(ClassPrediction(str(path), names, best.values.tolist()))
        return predictions

    def geometry(self, spec: InputSpec) -> dict[str, Any]:
        """Resized and cropped; or as they are, but for those that are too large."""
        data = self.config.data
        if not data.native:
            return super().geometry(spec)
        size = native_size(spec, data, train=False)
        multiple = size.patch_size if size.whole_patches else 1
        return {
            "own_size": {"sides_are_multiples_of": multiple, "at_most_patches": size.max_patches},
            "interpolation": spec.interpolation,
        }

    def sample(self, dataset: Any, spec: InputSpec, count: int) -> tuple[Tensor, list[int]]:
        """Images that can be read, resized and cropped as in validation, and their classes."""
        transform = eval_transform(spec)
        inputs, labels = [], []
        for index in spread_indices(len(dataset), count):
            image, label = dataset[index]
            if label != IGNORE:
                inputs.append(transform(image))
                labels.append(label)
        if not inputs:
            raise DataError(f"none of {min(count, len(dataset))} images could be read")
        return torch.stack(inputs), labels

    def main_class(self, outputs: Tensor) -> list[int]:
        """The class of each image, from logits (images, classes)."""
        classes: list[int] = outputs.argmax(1).tolist()
        return classes


def _tokens(size: NativeSize, image: Tensor | str) -> int:
    """Of an image, class token included; of one that could not be read, none."""
    return 0 if isinstance(image, str) else size.patches(*image.shape[1:]) + 1
