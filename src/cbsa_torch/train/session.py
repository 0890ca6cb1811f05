"""A run at work: what it works with, how it is set up, saved and resumed.

Every function here is called on every process; only the main one writes files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from cbsa_torch._core.files import write_atomically
from cbsa_torch._version import __version__
from cbsa_torch.models.checkpoint import CheckpointError, check_fit, save_tensors
from cbsa_torch.train.config import RunConfig, to_dict
from cbsa_torch.train.data import TokenBatches
from cbsa_torch.train.engine.accelerate import (
    on_main,
    prepare_for_replicas,
    replicas,
    shard,
    share_tokens,
    synchronize_batch_norm,
    to_channels_last,
    use_separate_generator,
)
from cbsa_torch.train.engine.console import Reporter
from cbsa_torch.train.engine.optim import check_optimizer, make_optimizer, make_scheduler
from cbsa_torch.train.engine.tracking import start_trackers
from cbsa_torch.train.errors import ConfigError, DataError, RunFolderError
from cbsa_torch.train.hub import model_card
from cbsa_torch.train.losses import Loss, cross_entropy
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.run.signals import StopRequests
from cbsa_torch.train.run.state import (
    compare_data,
    model_state,
    optimizer_state,
    random_states,
    read_state,
    restore,
    restore_random_states,
)
from cbsa_torch.train.tasks.base import Task


@dataclass
class Progress:
    """How far a run is; part of its training state."""

    epoch: int = 0
    """Epochs done, validation included."""
    step: int = 0
    """Optimiser steps done."""
    best_epoch: int = 0
    """The epoch with the best validation score so far, of equal ones that with the smallest loss; 0 before the
    first."""
    best_score: float = -1.0
    """That score."""
    best_loss: float = math.inf
    """The validation loss of that epoch."""
    batch: int = 0
    """Batches done of the current epoch. All that follows is about these batches."""
    loss: float = 0.0
    """Sum of the training loss over the targets of all processes."""
    targets: float = 0.0
    """How many those were: images, or pixels."""
    images: float = 0.0
    """Images with at least one."""
    seconds: float = 0.0
    """Time that the main process spent on them."""
    waited: float = 0.0
    """The part of this time in which it waited for data."""
    lr: float = 0.0
    """Learning rate of the last step."""

    def end_epoch(self) -> None:
        """Count the current epoch as done."""
        self.epoch += 1
        self.batch, self.loss, self.targets, self.images, self.seconds, self.waited = 0, 0.0, 0.0, 0.0, 0.0, 0.0


@dataclass(kw_only=True)
class Session:
    """Everything a run works with."""

    config: RunConfig
    task: Task
    folder: RunFolder
    accelerator: Accelerator
    reporter: Reporter
    """Prints on the main process."""
    stop: StopRequests
    """Whether Ctrl-C or SIGTERM asked this process to stop."""
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
    """What a training state remembers of the data, see :func:`compare_data`."""
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
    replica = replicas(accelerator, config.engine.context_parallel)
    batch_size = _batch_per_process(config, replica.number)

    continued = not config.overwrite and bool(folder.states().paths())
    setup = task.open(folder.skipped, continued=continued)
    for note in setup.notes:
        reporter.say(note)
    model = setup.model
    if config.engine.fsdp:
        shard(accelerator, model)
    else:
        to_channels_last(model)
    optimizer = make_optimizer(model, config.optim, setup.lr_scales, sharded=config.engine.fsdp)
    train_loader = task.training_loader(setup, batch_size)
    use_separate_generator(train_loader)
    _check_loader(train_loader, batch_size, replica.number)
    share_tokens(model, replica)

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
        # torch (2.14) cannot compile the exchanges of context parallel with sizes left open
        model.compile(dynamic=None if replica.group is None else False)
    parameters = sum(p.numel() for p in model.parameters())
    reporter.say(
        f"{config.model.name}: {parameters:,} parameters; {config.data.name}: "
        f"{len(train_loader.dataset):,} training and {len(setup.val):,} validation {task.unit}, "  # type: ignore[arg-type]
        f"{len(setup.class_names)} classes; {_engine(accelerator)}; folder {folder.path}"
    )
    model, prepared_optimizer = accelerator.prepare(model, optimizer)
    train_loader = prepare_for_replicas(accelerator, train_loader, replica)
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
        data_facts={
            "class_names": list(setup.class_names),
            "training": len(train_loader.dataset),
            "validation": len(setup.val),  # type: ignore[arg-type]
        },
        loss=cross_entropy(config.optim.label_smoothing) if setup.loss is None else setup.loss,
        steps_per_epoch=steps_per_epoch,
        description=description,
    )


def save_weights(session: Session, epoch: int, score: float) -> None:
    """Write the weights file; called on every process, written by one."""
    state = model_state(session.eval_model)
    if session.accelerator.is_main_process:
        info = {**session.description, "epoch": epoch, session.task.score: score}
        save_tensors(session.folder.weights, state, info)
        card = model_card(info, session.folder.read_metrics())
        write_atomically(session.folder.card, card.encode())


def save_state(session: Session, progress: Progress) -> None:
    """Save all that going on needs; called on every process, written by one."""
    accelerator = session.accelerator
    scaler = accelerator.scaler
    state = {
        "progress": dict(vars(progress)),
        "batch_size": _images_per_batch(session.config),
        "data": session.data_facts,
        "model": model_state(session.model),
        "ema": None if session.ema is None else session.ema.module.state_dict(),
        "optimizer": optimizer_state(session.model, session.optimizer),
        "scaler": None if scaler is None else scaler.state_dict(),
        "random": gather_object([random_states()]),
    }
    if accelerator.is_main_process:
        session.folder.states(session.config.engine.keep_states).save(progress.step, state)
    accelerator.wait_for_everyone()


def resume(session: Session) -> Progress:
    """Load the newest state that is whole, or start over if the run died before its first."""
    folder, accelerator, reporter = session.folder, session.accelerator, session.reporter
    path, problems = on_main(accelerator, folder.states().newest, (CheckpointError,))
    for problem in problems:
        reporter.say(f"left aside: {problem}")
    progress = Progress() if path is None else _restore(session, path)
    if accelerator.is_main_process:
        if path is not None:
            folder.describe(session.config)  # only now: a changed configuration may not have fitted
        folder.keep_metrics_until(progress.epoch, reporter.say)
    accelerator.wait_for_everyone()
    if path is not None:
        epochs = session.config.optim.epochs
        within = f", batch {progress.batch} of {len(session.train_loader)}" if progress.batch else ""
        verb = "finished already:" if progress.epoch >= epochs else "continuing after"
        reporter.say(f"{verb} epoch {progress.epoch} of {epochs}{within} ({path})")
    return progress


def _restore(session: Session, path: Path) -> Progress:
    state = read_state(path)
    try:
        progress = Progress(**state["progress"])
        for remark in compare_data(state["data"], session.data_facts, progress.batch, str(path)):
            session.reporter.say(remark)
        progress.batch = min(progress.batch, len(session.train_loader))
        restore(
            session.model, session.optimizer, state["model"], state["optimizer"], session.state_spec, str(path)
        )
        if session.ema is not None:
            if state["ema"] is None:
                raise CheckpointError(f"{path} has no average of the weights: leave optim.ema_decay unset")
            check_fit(state["ema"], session.state_spec, str(path), exact_dtype=True)
            session.ema.module.load_state_dict(state["ema"])
        if session.accelerator.scaler is not None and state["scaler"] is not None:
            session.accelerator.scaler.load_state_dict(state["scaler"])
        if state["batch_size"] != _images_per_batch(session.config):  # an accepted change
            seen = progress.batch * state["batch_size"]
            steps = seen // session.config.optim.batch_size  # whole ones
            progress.batch = min(steps * session.config.engine.accumulate, len(session.train_loader))
        states = state["random"]
        if len(states) == session.accelerator.num_processes:
            restore_random_states(states[session.accelerator.process_index])
        else:
            session.reporter.say(
                f"the run goes on with {session.accelerator.num_processes} process(es) instead of "
                f"{len(states)}: what dropout draws is not what it would have been"
            )
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit this run: {error}") from error
    return progress


def _images_per_batch(config: RunConfig) -> int:
    """Images of one forward pass of all processes."""
    return config.optim.batch_size // config.engine.accumulate


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
            f"optim.batch_size ({config.optim.batch_size}) must be divisible by processes (groups of them in "
            f"context parallel) x accumulation steps ({processes} x {config.engine.accumulate})"
        )
    return config.optim.batch_size // parts


def _check_loader(loader: DataLoader[Any], batch_size: int, processes: int) -> None:
    if isinstance(loader.batch_sampler, TokenBatches):
        return  # it has a batch for every process
    if isinstance(loader.dataset, IterableDataset) and processes > 1:
        raise ConfigError("data sets that stream (wds, tfds, hfids) must be trained in one process for now")
    if len(loader) < processes:
        raise DataError(
            f"{len(loader.dataset)} training images are fewer than one batch of {batch_size} for each of "  # type: ignore[arg-type]
            f"{processes} process(es); lower optim.batch_size"
        )
