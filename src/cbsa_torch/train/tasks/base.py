"""What is trained: all that the trainer does not know itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cbsa_torch.train.config.base import RunConfig
from cbsa_torch.train.data import InputSpec

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""What is minimised, of (model, images, targets): a mean over the targets that are not ``IGNORE``."""


class Opened(NamedTuple):
    """The model and the data of a run."""

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
    note: str = ""
    """What people should know before training begins."""


class Measured(Protocol):
    """What an evaluation measured."""

    @property
    def score(self) -> float:
        """The larger, the better."""

    @property
    def loss(self) -> float:
        """Mean over the targets."""

    @property
    def images(self) -> int:
        """How many were seen; 0 if none could be read."""


class Task(Protocol):
    """A kind of training. Batches are (images, targets), targets of any shape with ``IGNORE`` among them.

    Unless :class:`Opened` says otherwise, the loss is the mean cross-entropy over the targets.
    """

    score: str
    """Name of the score in metrics.jsonl."""
    score_title: str
    """The same for people."""

    def check(self, config: RunConfig) -> None:
        """Refuse settings of the task that cannot work; raises ConfigError."""

    def open(self, config: RunConfig, skipped: Path, *, continued: bool) -> Opened:
        """Open data and model.

        Args:
            config: of the run.
            skipped: file that lists images that could not be read.
            continued: the weights will come from a state, so that none need be fetched.
        """

    def training_loader(self, config: RunConfig, opened: Opened, batch_size: int) -> DataLoader[Any]:
        """Batches of one process's size; Accelerate shares them between the processes."""

    def validation_loader(
        self, config: RunConfig, opened: Opened, batch_size: int, accelerator: Accelerator
    ) -> Any:
        """What :meth:`evaluate` goes through, shared between the processes already."""

    def evaluate(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        model: nn.Module,
        loader: Any,
        class_names: Sequence[str],
        advance: Callable[[], None],
        check: Callable[[], None],
    ) -> Measured:
        """Measure the model; the same numbers on every process.

        Args:
            advance: called after every batch (progress bar).
            check: called before every batch, equally often on every process; it may raise.
        """


def task_of(config: RunConfig) -> Task:
    """The task that a configuration is for."""
    from cbsa_torch.train.config.base import TrainConfig
    from cbsa_torch.train.tasks.adaptation.config import AdaptTrainConfig  # tasks build on this module
    from cbsa_torch.train.tasks.adaptation.task import Adaptation
    from cbsa_torch.train.tasks.classification import Classification
    from cbsa_torch.train.tasks.segmentation.task import Segmentation

    if isinstance(config, AdaptTrainConfig):
        return Adaptation()
    return Classification() if isinstance(config, TrainConfig) else Segmentation()
