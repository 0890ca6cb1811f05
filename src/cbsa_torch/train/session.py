"""Everything a run works with, checked and put together before its first step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from cbsa_torch._version import __version__
from cbsa_torch.train.config.base import RunConfig, to_dict
from cbsa_torch.train.engine.accelerator import draw_apart, shard
from cbsa_torch.train.engine.console import Reporter
from cbsa_torch.train.engine.on_main import on_main
from cbsa_torch.train.engine.optim import make_optimizer, make_scheduler
from cbsa_torch.train.engine.optim_check import check_optimizer
from cbsa_torch.train.engine.speed import to_channels_last
from cbsa_torch.train.engine.sync_batch_norm import synchronize_batch_norm
from cbsa_torch.train.engine.tracking import start_trackers
from cbsa_torch.train.errors import ConfigError, DataError, RunFolderError
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.run.same_data import data_facts
from cbsa_torch.train.run.signals import StopRequests
from cbsa_torch.train.tasks.base import Loss, Task


class Session(NamedTuple):
    """Everything a run works with."""

    config: RunConfig
    task: Task
    folder: RunFolder
    accelerator: Accelerator
    reporter: Reporter
    stop: StopRequests
    model: nn.Module
    """As Accelerate wraps it."""
    own: dict[str, Tensor]
    """Names, shapes and dtypes of the bare model's state; no values."""
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    """As torch knows it: not wrapped."""
    stepper: Any
    """The optimiser as Accelerate wraps it."""
    scheduler: Any
    train_loader: DataLoader[Any]
    val_loader: Any
    """What the task evaluates on."""
    data: dict[str, Any]
    """What a state remembers of the data."""
    loss: Loss | None
    """What is minimised, where it is not the cross-entropy."""
    description: dict[str, Any]
    """What a checkpoint says about itself: enough to rebuild, feed and judge the model."""

    @property
    def candidate(self) -> nn.Module:
        """What is evaluated and kept for use: the average, if there is one. The same on every process."""
        return self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module


def prepare(
    config: RunConfig, task: Task, folder: RunFolder, accelerator: Accelerator, stop: StopRequests
) -> Session:
    """Check everything else, then create the run's folder and wrap the model."""
    reporter = Reporter(accelerator.is_main_process)
    check_optimizer(config.optim, accelerator.device)
    set_seed(config.seed)
    batch_size = _batch_per_process(config, accelerator.num_processes)

    continued = not config.overwrite and bool(folder.states().paths())
    opened = task.open(config, folder.skipped, continued=continued)
    model = opened.model
    if config.engine.fsdp:
        shard(accelerator, model)
    else:
        to_channels_last(model)
    optimizer = make_optimizer(model, config.optim, opened.lr_scales, sharded=config.engine.fsdp)
    train_loader = task.training_loader(config, opened, batch_size)
    draw_apart(train_loader)
    _check_loader(train_loader, batch_size, accelerator.num_processes)

    accelerator.wait_for_everyone()  # every process has looked at the folder
    on_main(accelerator, lambda: folder.start(config, reporter.say), (RunFolderError, OSError))
    start_trackers(accelerator, config, reporter.say)

    own = {name: value.to("meta") for name, value in model.state_dict().items()}
    if accelerator.num_processes > 1:
        model = synchronize_batch_norm(model, accelerator.device)
    ema = None
    if config.optim.ema_decay is not None:
        ema = ModelEmaV3(model, decay=config.optim.ema_decay, use_warmup=True, device=accelerator.device)
    if config.engine.compile:
        model.compile()
    if opened.note:
        reporter.say(opened.note)
    parameters = sum(p.numel() for p in model.parameters())
    reporter.say(
        f"{config.model.name}: {parameters:,} parameters; {config.data.name}: "
        f"{len(train_loader.dataset):,} training and {len(opened.val):,} validation images, "  # type: ignore[arg-type]
        f"{len(opened.class_names)} classes; {_engine(accelerator)}; folder {folder.path}"
    )
    model, stepper, train_loader = accelerator.prepare(model, optimizer, train_loader)
    val_loader = task.validation_loader(config, opened, batch_size, accelerator)
    # From here on processes draw differently (dropout), but the data comes in an order of its own.
    set_seed(config.seed, device_specific=True)
    steps_per_epoch = -(-len(train_loader) // config.engine.accumulate)
    scheduler = make_scheduler(optimizer, config.optim, steps_per_epoch)
    description = {
        "model": config.model.name,
        "model_args": opened.model_args,
        "class_names": opened.class_names,
        "input": opened.spec._asdict(),
        "config": to_dict(config),
        "cbsa_torch": __version__,
    }
    return Session(
        config,
        task,
        folder,
        accelerator,
        reporter,
        stop,
        model,
        own,
        ema,
        optimizer,
        stepper,
        scheduler,
        train_loader,
        val_loader,
        data_facts(opened.class_names, train_loader.dataset, opened.val),
        opened.loss,
        description,
    )


def _engine(accelerator: Accelerator) -> str:
    """Where and how a run is computed, in words."""
    if accelerator.num_processes == 1:
        return f"device {accelerator.device}"
    how = "sharded (FSDP2)" if accelerator.is_fsdp2 else "each with a copy (DDP)"
    return f"{accelerator.num_processes} processes on {accelerator.device.type}, {how}"


def _batch_per_process(config: RunConfig, processes: int) -> int:
    """Images per forward pass of one process; the configured batch must divide."""
    parts = processes * config.engine.accumulate
    if config.optim.batch_size % parts:
        raise ConfigError(
            f"optim.batch_size ({config.optim.batch_size}) must be divisible by processes x accumulation "
            f"steps ({processes} x {config.engine.accumulate})"
        )
    return config.optim.batch_size // parts


def _check_loader(loader: DataLoader[Any], batch_size: int, processes: int) -> None:
    if isinstance(loader.dataset, IterableDataset) and processes > 1:
        raise ConfigError("data sets that stream (wds, tfds, hfids) are trained in one process for now")
    if len(loader) < processes:
        raise DataError(
            f"{len(loader.dataset)} training images are fewer than one batch of {batch_size} for each of "  # type: ignore[arg-type]
            f"{processes} process(es); lower optim.batch_size"
        )
