"""The task of classifying whole slides: bags of features with coordinates, a label for each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassConfusionMatrix

from cbsa_torch._core.checks import check_choice, nearest, some_of
from cbsa_torch.models.token_set import TokenSetTransformer
from cbsa_torch.models.token_set_registry import token_set_names
from cbsa_torch.train.build import build_model, draft_model
from cbsa_torch.train.data import InputSpec, OpenedSplit, Splits, describe
from cbsa_torch.train.data.seeded import SeededSamples
from cbsa_torch.train.data.splits import check_split
from cbsa_torch.train.data.workers import ignore_signals_in_workers
from cbsa_torch.train.engine.accelerate import use_separate_generator
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.losses import cross_entropy
from cbsa_torch.train.tasks.base import PredictOptions, Task, TaskSetup, Trained, WindowOptions
from cbsa_torch.train.tasks.classification import ClassPrediction
from cbsa_torch.train.tasks.slides.bags import (
    Bags,
    Collate,
    FeatureSpec,
    RandomTiles,
    SlideBags,
    check_fed,
    read_for,
)
from cbsa_torch.train.tasks.slides.config import SlidesDataConfig, SlidesTrainConfig, check_slide_settings
from cbsa_torch.train.tasks.slides.files import find_file, read_header
from cbsa_torch.train.tasks.slides.table import Row, assign_splits, read_table


class SlidesResult(NamedTuple):
    """What one pass over slides measured."""

    auc: float
    """Area under the ROC curve; of several classes, the mean of each against the others."""
    balanced_accuracy: float
    """Mean over the classes of the share that is classified right."""
    loss: float
    """Mean cross-entropy, without weights of classes and label smoothing."""
    images: int
    """Slides."""
    confusion: list[list[int]]
    """Counts, rows = true classes, columns = predicted."""

    @property
    def score(self) -> float:
        """What the best epoch is chosen by."""
        return self.auc

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return self._asdict()

    def summary(self) -> str:
        """In one line."""
        return (
            f"AUC: {self.auc:.4f}  balanced accuracy: {self.balanced_accuracy:.4f}  loss: {self.loss:.4f}  "
            f"slides: {self.images}"
        )

    def class_table(self) -> list[list[str]]:
        """Nothing by class."""
        return []


class SlideClassification(Task):
    """One class for every slide."""

    config: SlidesTrainConfig
    score = "val_auc"
    score_title = "AUC"
    hub_task, hub_metric = "image-classification", "roc_auc"
    model_kind = "classifier of whole slides"
    share_title = "probability"
    one_class_per_image = True
    unit = "slides"
    takes_images = False
    spec_type = FeatureSpec
    unused_options = frozenset({"window", "stride", "scales", "flip", "masks"})

    def check(self) -> None:
        """Refuse settings that cannot work."""
        check_slide_settings(self.config)
        model = self.config.model
        if model.name not in token_set_names():
            raise ConfigError(
                f"model.name must be a model of sets of features for slides, got {model.name!r}"
                f"{nearest(model.name, token_set_names())}; `cbsa list` shows them"
            )

    def open_data(self, mode: str, skipped: Path) -> Splits:
        """Splits of (slide, label); every file's shapes are read and checked, not its features."""
        data = self.config.data
        table = read_table(data)
        class_names = sorted({row.label for row in table.rows})
        if len(class_names) < 2:
            raise DataError(f"all slides have the label {class_names[0]!r}; classes need at least two")
        found = assign_splits(table.rows, data, self.config.seed)
        parts = {name: self._bags(rows, class_names) for name, rows in found.items()}
        for name in ("train", "val"):
            if name not in parts:
                raise DataError(f"there is no slide in the {name} split")
        widths = {name: bags.spec.in_dim for name, bags in parts.items()}
        for name, width in widths.items():
            if width != widths["train"]:
                raise DataError(
                    f"{parts[name].paths[0]} has features of width {width}, and {parts['train'].paths[0]} of "
                    f"width {widths['train']}"
                )
        for name, rows in found.items():
            _check_classes(name, {row.label for row in rows}, class_names)
        return Splits(parts["train"], parts["val"], parts.get("test"), class_names, table.notes)

    def _bags(self, rows: Sequence[Row], class_names: list[str]) -> SlideBags:
        """The files of some rows, all of one width."""
        root = Path(str(self.config.data.root))
        paths = [find_file(root, row.slide) for row in rows]
        headers = [read_header(path) for path in paths]
        spec = FeatureSpec(headers[0].width, self.config.data.coords)
        for path, header in zip(paths, headers, strict=True):
            check_fed(spec, path, header.width, header.has_coords)
        return SlideBags(paths, [class_names.index(row.label) for row in rows], spec)

    def open(self, skipped: Path, *, continued: bool) -> TaskSetup:
        """The slides, and the model for features of their width and with a head for their classes."""
        config = self.config
        splits = self.open_data("", skipped)
        train, val = cast(SlideBags, splits.train), cast(SlideBags, splits.val)
        spec = train.spec
        if config.model.init_from is None:
            asked = config.model.args.get("in_dim", spec.in_dim)
            if asked != spec.in_dim:
                raise ConfigError(f"model.args in_dim {asked} is not the width of the features, {spec.in_dim}")
            model_config = dataclasses.replace(config.model, args={**config.model.args, "in_dim": spec.in_dim})
            config = dataclasses.replace(config, model=model_config)
        model, args, notes = build_model(config, len(splits.class_names), draft_model(config))
        _check_model(model, spec, config.data)
        counts = torch.bincount(torch.tensor(train.targets), minlength=len(splits.class_names))
        weights = None if config.data.class_weights == "none" else counts.sum() / (len(counts) * counts)
        loss = cross_entropy(config.optim.label_smoothing, weights, _logits)
        fed = cast(InputSpec, spec)  # the trainer only hands it on
        told = [*describe(splits), *notes]
        return TaskSetup(model, args, splits.class_names, fed, train, val, loss, notes=told)

    def training_loader(self, setup: TaskSetup, batch_size: int) -> DataLoader[Any]:
        """Slides in random order, of each at most ``data.max_tiles`` random tiles."""
        shared = self.config.engine.context_parallel
        if shared > 1 and batch_size > 1:
            raise ConfigError(
                f"engine.context_parallel ({shared}) spreads one slide at a time, and a forward pass has "
                f"{batch_size}: raise engine.accumulate"
            )
        samples, data = SeededSamples(setup.train, self.config.seed), self.config.data
        samples.transform = None if data.max_tiles is None else RandomTiles(data.max_tiles)
        loader = _loader(samples, cast(FeatureSpec, setup.spec), data, batch_size, train=True)
        ignore_signals_in_workers(loader)
        return loader

    def open_split(
        self, mode: str, class_names: list[str], split: str | None, skipped: Path | None = None
    ) -> OpenedSplit:
        """A split of (slide, label), drawn as in training."""
        check_split(split)
        data = self.config.data
        table = read_table(data)
        others = sorted({row.label for row in table.rows} - set(class_names))
        if others:
            raise DataError(f"the model has no class {some_of(others)}; its classes are {some_of(class_names)}")
        found = assign_splits(table.rows, data, self.config.seed)
        name = split or ("test" if "test" in found else "val")
        if name not in found:
            raise DataError(f"there is no slide in the {name} split; choose another")
        _check_classes(name, {row.label for row in found[name]}, class_names)
        return OpenedSplit(name, self._bags(found[name], class_names), table.notes)

    def evaluation_loader(
        self, dataset: Dataset[Any], spec: InputSpec, accelerator: Accelerator, batch_size: int | None = None
    ) -> Any:
        """Whole slides in order, shared between the processes by Accelerate; by default one at a time."""
        fed = cast(FeatureSpec, spec)
        for path in cast(SlideBags, dataset).paths[:1]:  # all have one width
            check_fed(fed, path, cast(SlideBags, dataset).spec.in_dim, True)
        loader = _loader(dataset, fed, self.config.data, batch_size or 1, train=False)
        ignore_signals_in_workers(loader)
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
    ) -> SlidesResult:
        """AUC, balanced accuracy and loss."""
        if windows is not None:
            self.check_options(windows)
        model.eval()
        # Predictions are gathered below, so every process counts them all: metrics must not add up again.
        common: dict[str, Any] = {"num_classes": len(class_names), "sync_on_compute": False}
        metrics = MetricCollection(
            {
                "auc": MulticlassAUROC(average="macro", **common),
                "balanced_accuracy": MulticlassAccuracy(average="macro", **common),
                "confusion": MulticlassConfusionMatrix(**common),
            },
            compute_groups=False,
        ).to(accelerator.device)
        losses = []
        for bags, targets in batches:
            bags, targets = bags.to(accelerator.device), targets.to(accelerator.device)
            with accelerator.autocast():
                logits = bags.logits(model)
            logits, targets = accelerator.gather_for_metrics((logits.float(), targets))
            metrics.update(logits.softmax(-1), targets)
            losses += F.cross_entropy(logits, targets, reduction="none").tolist()
        values = metrics.compute()
        return SlidesResult(
            auc=values["auc"].item(),
            balanced_accuracy=values["balanced_accuracy"].item(),
            loss=math.fsum(losses) / len(losses),
            images=len(losses),
            confusion=values["confusion"].tolist(),
        )

    @torch.inference_mode()
    def predict(
        self, trained: Trained, images: Sequence[str | Path], options: PredictOptions
    ) -> list[ClassPrediction]:
        """The probabilities of the classes of each slide, the largest first."""
        self.check_options(options)
        check_choice("on_bad_image", options.on_bad_image, ("stop", "skip"))
        top = len(trained.class_names) if options.top is None else options.top
        if top < 1:
            raise ConfigError(f"top must be at least 1, got {top}")
        device, spec = next(trained.model.parameters()).device, cast(FeatureSpec, trained.spec)
        predictions = []
        for path in map(Path, images):
            try:
                bags = Bags.of([read_for(spec, path)], spec)
            except DataError as error:
                if options.on_bad_image == "stop":
                    raise
                predictions.append(ClassPrediction(str(path), [], [], str(error)))
                continue
            probabilities = bags.to(device).logits(trained.model).float().softmax(-1)[0]
            best = probabilities.topk(min(top, len(trained.class_names)))
            names = [trained.class_names[i] for i in best.indices.tolist()]
            predictions.append(ClassPrediction(str(path), names, best.values.tolist()))
        return predictions

    def sample(self, dataset: Dataset[Any], spec: InputSpec, count: int) -> tuple[Tensor, list[int]]:
        """Pages are about images."""
        raise ConfigError("reports show images, and this model takes slides; cbsa predict draws their maps")

    def main_class(self, outputs: Tensor) -> list[int]:
        """The class of each slide, from logits (slides, classes)."""
        classes: list[int] = outputs.argmax(1).tolist()
        return classes


def _logits(model: nn.Module, bags: Any) -> Tensor:
    return cast(Bags, bags).logits(model)


def _loader(
    dataset: Dataset[Any], spec: FeatureSpec, data: SlidesDataConfig, batch_size: int, *, train: bool
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=data.workers,
        collate_fn=Collate(spec),
    )


def _check_classes(split: str, there: set[str], class_names: Sequence[str]) -> None:
    """Every split needs every class: else there is nothing to learn of it, or no AUC."""
    missing = [name for name in class_names if name not in there]
    if missing:
        raise DataError(
            f"the {split} split has no slide of {some_of(missing)}: the AUC needs all classes; give splits in "
            "the table, or larger fractions"
        )


def _check_model(model: nn.Module, spec: FeatureSpec, data: SlidesDataConfig) -> None:
    """A model that takes these features and what is known of their places."""
    if not isinstance(model, TokenSetTransformer):
        raise ConfigError(f"model.init_from must hold a model of sets of features, not {type(model).__name__}")
    if model.in_dim != spec.in_dim:
        raise ConfigError(
            f"model.init_from takes features of width {model.in_dim}, and the slides have {spec.in_dim}"
        )
    if model.needs_coords and not data.coords:
        raise ConfigError(
            "data.coords must be true for this model, which needs coordinates; model.args positions none "
            "representatives learned makes one that does not"
        )
