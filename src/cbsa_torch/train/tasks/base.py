"""What a task is: everything that training, evaluation, prediction and reports do not know themselves.

To add a task, write a configuration (a subclass of :class:`cbsa_torch.train.config.RunConfig`) and a
subclass of :class:`Task`, and add both to the table in :mod:`cbsa_torch.train.registry`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import create_transform
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cbsa_torch._core.checks import check_choice
from cbsa_torch.train.config import RunConfig
from cbsa_torch.train.data import InputSpec, OpenedSplit, Splits, read_image_file
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.losses import Loss

TIMM_LINK = "[timm](https://github.com/huggingface/pytorch-image-models)"
"""In Markdown, for model cards."""


class TaskSetup(NamedTuple):
    """The model and the data of a run, as :meth:`Task.open` gives them to training."""

    model: nn.Module
    model_args: dict[str, Any]
    """Constructor arguments that rebuild it."""
    class_names: list[str]
    """In the order of its outputs."""
    spec: InputSpec
    train: Dataset[Any]
    val: Dataset[Any]
    loss: Loss | None = None
    """Default: the cross-entropy of the model's outputs."""
    lr_scales: Mapping[str, float] = {}
    """Factors on the learning rate, by parameter."""
    notes: Sequence[str] = ()
    """Printed before training begins: what was read of the data and of weights, and what was left out."""


class EvalResult(Protocol):
    """What an evaluation measured."""

    @property
    def score(self) -> float:
        """What the best epoch is chosen by: the larger, the better."""

    @property
    def loss(self) -> float:
        """Mean over the targets."""

    @property
    def images(self) -> int:
        """How many were seen; 0 if none could be read."""

    def record(self) -> dict[str, Any]:
        """Everything measured as plain values: for JSON, and for report pages."""

    def summary(self) -> str:
        """The most important numbers in one line."""

    def class_table(self) -> list[list[str]]:
        """A heading and a row for each class; empty if the summary says enough."""


class Prediction(Protocol):
    """What was predicted of one image file, or why it could not be read."""

    @property
    def image(self) -> str:
        """The file."""

    @property
    def error(self) -> str | None:
        """Why it could not be read."""

    def class_shares(self) -> list[tuple[str, float]]:
        """Classes with their probability, or their share of the pixels; the largest first."""

    def _asdict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""


@dataclass
class WindowOptions:
    """How a segmenter sees whole images; classifiers refuse all but the defaults.

    Examples:
        >>> from cbsa_torch.train import WindowOptions
        >>> WindowOptions(scales=(0.75, 1.0, 1.25), flip=True).multi_scale
        True
    """

    window: int | None = None
    """Segmenters: side of the windows in pixels. Default: as in validation."""
    stride: int | None = None
    """Segmenters: pixels from one window to the next. Default: as in validation, or the window."""
    scales: tuple[float, ...] = (1.0,)
    """Segmenters: resize images by these factors and average, e.g. 0.5 0.75 1.0 1.25 1.5 1.75."""
    flip: bool = False
    """Segmenters: average with the mirrored image, too."""

    @property
    def multi_scale(self) -> bool:
        """Whether images are seen in more than one way."""
        return self.scales != (1.0,) or self.flip


@dataclass
class PredictOptions(WindowOptions):
    """How image files are classified or segmented."""

    top: int | None = None
    """Classifiers: how many classes to name. Default: 5."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What to do about an unreadable image."""
    masks: str | None = None
    """Segmenters: the folder for NAME_mask.png (coloured, with a legend) and NAME_labels.png (numbers).
    Default: predicted_masks."""
    maps: str | None = None
    """Slides: the folder for predictions.csv, and for NAME_map.png and NAME_map.csv, how much the class token
    attends to every tile. Default: predicted_slides."""
    overwrite: bool = False
    """Segmenters and slides: replace files of these names."""


class Task(ABC):
    """A kind of training, built with the configuration of a run.

    Batches are (images, targets), targets of any shape with ``IGNORE`` among them. Unless :class:`TaskSetup`
    has another loss, it is the mean cross-entropy over the targets.
    """

    score: ClassVar[str]
    """Name of the score in ``metrics.jsonl`` and in weights files."""
    score_title: ClassVar[str]
    """The same for people."""
    hub_task: ClassVar[str]
    """The Hugging Face Hub's name of the task."""
    hub_metric: ClassVar[str]
    """The Hub's name of the score."""
    model_kind: ClassVar[str] = "image classifier"
    """What models of the task are called on their cards."""
    own_model: ClassVar[str | None] = None
    """Name of the one model that the task trains. Default: classifiers of many names."""
    share_title: ClassVar[str]
    """What the numbers of :meth:`Prediction.class_shares` are."""
    one_class_per_image: ClassVar[bool]
    """Whether an image has a single class, so that runs can be compared image by image."""
    data_name_elsewhere: ClassVar[str | None] = None
    """``data.name`` of another folder to evaluate on. Default: as in training."""

    unit: ClassVar[str] = "images"
    """What its samples are called in messages."""
    takes_images: ClassVar[bool] = True
    """Whether samples are images, which pages about runs show."""
    spec_type: ClassVar[type[Any]] = InputSpec
    """What a model is fed, as it is written to weights files."""
    unused_options: ClassVar[frozenset[str]] = frozenset({"maps"})
    """Fields of :class:`PredictOptions` that have no effect for the task, and are refused."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def with_data(self, data: Any) -> Task:
        """The same task on other data, given as ``config.data`` is."""
        return type(self)(dataclasses.replace(self.config, data=data))

    def with_native(self, changes: Mapping[str, Any]) -> Task:
        """The same task with other settings of images at their own size.

        Args:
            changes: some of ``native``, ``max_tokens`` (of a forward pass) and ``max_image_tokens``.

        Raises:
            ConfigError: one that has no effect for the task.
        """
        raise self.no_effect(next(iter(changes)))

    @staticmethod
    def check_native(native: bool, changes: Mapping[str, Any]) -> None:
        """Refuse settings of images at their own size where that is not how they are seen."""
        if not native:
            raise ConfigError(f"{', '.join(changes)}: only for images at their own size; add native")

    def no_effect(self, option: str) -> ConfigError:
        """What to raise where an option was given that the task has no use for."""
        return ConfigError(
            f"{option} has no effect for the task {self.config.task!r}, which this model was trained for; "
            "leave it out"
        )

    @classmethod
    def model_summary(cls, args: Mapping[str, Any], shown: Callable[[object], str]) -> str:
        """What :attr:`own_model` is made of, in Markdown for its card: its arguments, if a task says no more.

        Args:
            args: its constructor arguments; those left out have their defaults.
            shown: escapes a value for Markdown.
        """
        given = ", ".join(f"{shown(name)} {shown(value)}" for name, value in args.items())
        return f"{shown(cls.own_model)} with {given or 'its defaults'}"

    @abstractmethod
    def check(self) -> None:
        """Refuse settings of the task that cannot work; raises ConfigError."""

    def check_options(self, options: WindowOptions) -> None:
        """Refuse options of evaluation or prediction that have no effect or cannot work; raises ConfigError."""
        for option in dataclasses.fields(options):
            if option.name in self.unused_options and getattr(options, option.name) != option.default:
                raise self.no_effect(option.name)

    @abstractmethod
    def open_data(self, mode: str, skipped: Path) -> Splits:
        """All splits, without transforms.

        Args:
            mode: colour mode of the images, "L" or "RGB".
            skipped: file that lists images that could not be read.

        Raises:
            ConfigError, DataError: the data cannot be used.
        """

    @abstractmethod
    def open(self, skipped: Path, *, continued: bool) -> TaskSetup:
        """Open data and model for training.

        Args:
            skipped: file that lists images that could not be read.
            continued: the weights will come from a training state, so that none need be fetched.
        """

    @abstractmethod
    def training_loader(self, setup: TaskSetup, batch_size: int) -> DataLoader[Any]:
        """Batches of one process's size; Accelerate shares them between the processes."""

    @abstractmethod
    def open_split(
        self, mode: str, class_names: list[str], split: str | None, skipped: Path | None = None
    ) -> OpenedSplit:
        """One split of the data, for a model that is trained already.

        Args:
            mode: colour mode of the images, "L" or "RGB".
            class_names: of the model; the data must have the same.
            split: "train", "val" or "test". None: the test split, or the validation split where there is none.
            skipped: file that lists images that could not be read. Default: they are only counted.

        Returns:
            The split, its samples without a transform.

        Raises:
            ConfigError, DataError: the data cannot be opened, or have no such split or other classes.
        """

    @abstractmethod
    def evaluation_loader(
        self, dataset: Dataset[Any], spec: InputSpec, accelerator: Accelerator, batch_size: int | None = None
    ) -> Any:
        """What :meth:`evaluate` goes through, shared between the processes already.

        Args:
            dataset: a split, whose transform is set.
            spec: what the model is fed.
            batch_size: images in a forward pass of one process; tasks that see images by windows use it in
                :meth:`evaluate` instead. Default: the task's.
        """

    @abstractmethod
    def evaluate(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        batches: Iterable[Any],
        class_names: Sequence[str],
        *,
        windows: WindowOptions | None = None,
        batch_size: int | None = None,
    ) -> EvalResult:
        """Measure the model; every image counts once, and the numbers are the same on every process.

        Args:
            batches: of :meth:`evaluation_loader`; equally many on every process.
            class_names: in the order of the model's outputs.
            windows: how images are seen. Default: as in validation.
            batch_size: what :meth:`evaluation_loader` was given. Tasks that see images by windows put as many
                windows into a forward pass; for others the batches have that size already.

        Raises:
            ConfigError: what :meth:`check_options` refuses in ``windows``.
        """

    @abstractmethod
    def predict(
        self, trained: Trained, images: Sequence[str | Path], options: PredictOptions
    ) -> Sequence[Prediction]:
        """See :func:`cbsa_torch.train.predict_images`."""

    def geometry(self, spec: Any) -> dict[str, Any]:
        """How :meth:`predict` fits an image to what the model is fed, as plain values for JSON.

        Args:
            spec: what the model is fed; for tasks that take images.
        """
        sides = spec.input_size[1:]
        cover = [math.floor(side / spec.crop_pct) for side in sides]
        return {
            "resize_to_cover": cover,
            "interpolation": spec.interpolation,
            "crop_at_the_centre": list(sides),
        }

    @abstractmethod
    def sample(self, dataset: Dataset[Any], spec: InputSpec, count: int) -> tuple[Tensor, list[int]]:
        """Images of a split for a report.

        Args:
            dataset: of :meth:`open_split`, before :meth:`evaluation_loader` sets its transform.
            spec: what the model is fed.
            count: how many; fewer where the split has fewer, or some cannot be read.

        Returns:
            Inputs (count, channels, height, width) and the class of each, or no classes where an image has no
            single one.
        """

    @abstractmethod
    def main_class(self, outputs: Tensor) -> list[int]:
        """The most likely class of each image, from a model's outputs."""


class Trained(NamedTuple):
    """A trained model with what its weights file says about it, as ``open_trained`` gives it."""

    model: nn.Module
    spec: InputSpec
    class_names: list[str]
    task: Task
    info: dict[str, Any]
    """The metadata of the weights file."""
    path: Path
    """The weights file."""

    @property
    def config(self) -> RunConfig:
        """The configuration of the run that trained it."""
        return self.task.config

    def fused(self) -> Trained:
        """The same with a copy of the model whose layers are merged for use, see :mod:`cbsa_torch.nn.fused`."""
        return self._replace(model=reparameterize_model(self.model))


def read_image(path: Path, mode: str) -> Image.Image:
    """Read an image file; raises DataError that names it."""
    if not path.is_file():
        raise DataError(f"no image at {path}")
    try:
        return read_image_file(path, mode)
    except DataError as error:
        raise DataError(f"cannot read image {path}: {error}") from error


def read_images(
    paths: Iterable[str | Path], mode: str, on_bad_image: str
) -> Iterator[tuple[Path, Image.Image | str]]:
    """Each file with its image, or with why it could not be read; that raises DataError if it is to "stop"."""
    check_choice("on_bad_image", on_bad_image, ("stop", "skip"))
    for path in map(Path, paths):
        try:
            image: Image.Image | str = read_image(path, mode)
        except DataError as error:
            if on_bad_image == "stop":
                raise
            image = str(error)
        yield path, image


def eval_transform(spec: InputSpec) -> Any:
    """Resize, crop at the centre, normalise: how a classifier sees images in validation."""
    return create_transform(
        spec.input_size,
        is_training=False,
        mean=spec.mean,
        std=spec.std,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
    )


def spread_indices(size: int, count: int) -> list[int]:
    """At most ``count`` indices evenly spread over ``size``, in an order that is the same every time.

    Not in their own order: folders come class by class, and the first few should be of all classes.
    """
    count = min(count, size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [i * size // count for i in order]
