"""Everything a run works with, checked and put together before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from cbsa_torch._version import __version__
from cbsa_torch.train.config.base import RunConfig, to_dict
from cbsa_torch.train.engine.accelerate import (
    on_main,
    shard,
    synchronize_batch_norm,
    to_channels_last,
    use_separate_generator,
)
from cbsa_torch.train.engine.console import Reporter
from cbsa_torch.train.engine.optim import check_optimizer, make_optimizer, make_scheduler
from cbsa_torch.train.engine.tracking import start_trackers
from cbsa_torch.train.errors import ConfigError, DataError, RunFolderError
from cbsa_torch.train.losses import Loss, cross_entropy
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.run.signals import StopRequests
from cbsa_torch.train.run.state import data_facts
from cbsa_torch.train.tasks.base import Task


@dataclass(kw_only=True)
class Session:
    """Everything a run works with."""

    config: RunConfig
    task: Task
    folder: RunFolder
    accelerator: Accelerator
    reporter: Reporter
    stop: StopRequests
    model: nn.Module
    """As Accelerate wraps it."""
    state_spec: dict[str, Tensor]
    """Names, shapes and dtypes of the bare model's state; no values."""
    ema: ModelEmaV3 | None
    """The moving average of the weights, if one is kept."""
    optimizer: torch.optim.Optimizer
    """As torch knows it: not wrapped."""
    prepared_optimizer: Any
    """The optimiser as Accelerate wraps it."""
    scheduler: Any
    train_loader: DataLoader[Any]
    val_loader: Any
    """What the task evaluates on."""
    data_facts: dict[str, Any]
    """What a training state remembers of the data."""
    loss: Loss
    """What is minimised."""
    steps_per_epoch: int
    """Optimiser steps; the last one of an epoch may have fewer parts."""
    description: dict[str, Any]
    """What a weights file says about itself: enough to rebuild, feed and judge the model."""

    @property
    def eval_model(self) -> nn.Module:
        """What is evaluated and kept for use: the average, if there is one. The same on every process."""
        return self.accelerator.unwrap_model(self.model) if self.ema is None else self.ema.module


def prepare(task: Task, folder: RunFolder, accelerator: Accelerator, stop: StopRequests) -> Session:
    """Check everything else, then create the run's folder and wrap the model.

    Raises:
        ConfigError, DataError: something cannot work; the folder was not touched.
        RunFolderError: the folder changed, or another process writes to it.
    """
    config, reporter = task.config, Reporter(accelerator.is_main_process)
    check_optimizer(config.optim, accelerator.device)
    set_seed(config.seed)
    batch_size = _batch_per_process(config, accelerator.num_processes)

    continued = not config.overwrite and bool(folder.states().paths())
    setup = task.open(folder.skipped, continued=continued)
    model = setup.model
    if config.engine.fsdp:
        shard(accelerator, model)
    else:
        to_channels_last(model)
    optimizer = make_optimizer(model, config.optim, setup.lr_scales, sharded=config.engine.fsdp)
    train_loader = task.training_loader(setup, batch_size)
    use_separate_generator(train_loader)
    _check_loader(train_loader, batch_size, accelerator.num_processes)

    accelerator.wait_for_everyone()  # every process has looked at the folder
    on_main(accelerator, lambda: folder.start(config, reporter.say), (RunFolderError, OSError))
    start_trackers(accelerator, config, reporter.say)

    state_spec = {name: value.to("meta") for name, value in model.state_dict().items()}
    if accelerator.num_processes > 1:
        model = synchronize_batch_norm(model, accelerator.device)
    ema = None
    if config.optim.ema_decay is not None:
        ema = ModelEmaV3(model, decay=config.optim.ema_decay, use_warmup=True, device=accelerator.device)
    if config.engine.compile:
        model.compile()
    if setup.note:
        reporter.say(setup.note)
    parameters = sum(p.numel() for p in model.parameters())
    reporter.say(
        f"{config.model.name}: {parameters:,} parameters; {config.data.name}: "
        f"{len(train_loader.dataset):,} training and {len(setup.val):,} validation images, "  # type: ignore[arg-type]
        f"{len(setup.class_names)} classes; {_engine(accelerator)}; folder {folder.path}"
    )
    model, prepared_optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    val_loader = task.evaluation_loader(setup.val, setup.spec, accelerator, batch_size)
    # From here on processes draw differently (dropout), but the data comes in an order of its own.
    set_seed(config.seed, device_specific=True)
    steps_per_epoch = -(-len(train_loader) // config.engine.accumulate)
    scheduler = make_scheduler(optimizer, config.optim, steps_per_epoch)
    description = {
        "model": config.model.name,
        "model_args": setup.model_args,
        "class_names": setup.class_names,
        "input": setup.spec._asdict(),
        "config": to_dict(config),
        "cbsa_torch": __version__,
    }
    return Session(
        config=config,
        task=task,
        folder=folder,
        accelerator=accelerator,
        reporter=reporter,
        stop=stop,
        model=model,
        state_spec=state_spec,
        ema=ema,
        optimizer=optimizer,
        prepared_optimizer=prepared_optimizer,
        scheduler=scheduler,
        train_loader=train_loader,
        val_loader=val_loader,
        data_facts=data_facts(setup.class_names, train_loader.dataset, setup.val),
        loss=cross_entropy(config.optim.label_smoothing) if setup.loss is None else setup.loss,
        steps_per_epoch=steps_per_epoch,
        description=description,
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
