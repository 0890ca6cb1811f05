"""Train a classifier from a configuration: everything in the order it happens."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from cbsa_torch._version import __version__
from cbsa_torch.models.checkpoint import CheckpointError, load_strictly, save_checkpoint
from cbsa_torch.train.build import build_model
from cbsa_torch.train.checkpoint import load_state, random_states, restore_random_states, save_state
from cbsa_torch.train.config import TrainConfig, check_config, to_dict
from cbsa_torch.train.data import input_spec, make_loader, open_splits, read_skipped, set_epoch
from cbsa_torch.train.errors import ConfigError, DataError, NonFiniteLossError
from cbsa_torch.train.loop import evaluate, new_accelerator, train_one_epoch
from cbsa_torch.train.optim import make_optimizer, make_scheduler
from cbsa_torch.train.progress import Reporter
from cbsa_torch.train.run_folder import RunFolder


class TrainResult(NamedTuple):
    """The outcome of a run."""

    folder: Path
    best_epoch: int
    best_top1: float
    """Validation accuracy of the best epoch."""


class _Progress(NamedTuple):
    """How far a run is."""

    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Optimiser steps done."""
    best_epoch: int = 0
    best_top1: float = -1.0


class _Session(NamedTuple):
    """Everything a run works with."""

    config: TrainConfig
    folder: RunFolder
    accelerator: Accelerator
    reporter: Reporter
    model: nn.Module
    """As Accelerate wraps it."""
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    train_loader: DataLoader[Any]
    val_loader: DataLoader[Any]
    description: dict[str, Any]
    """What a checkpoint says about itself: enough to rebuild, feed and judge the model."""

    @property
    def bare_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)


def train(config: TrainConfig) -> TrainResult:
    """Train as configured, into the folder ``config.output``.

    Everything that can be refused is refused before the folder is touched. After every epoch the state is
    saved, so an interrupted run continues from there with ``resume=True``.
    """
    check_config(config)
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    folder = RunFolder(config.output)
    folder.check(config)
    with new_accelerator(
        mixed_precision=config.engine.precision,
        cpu=config.engine.cpu,
        gradient_accumulation_steps=config.engine.accumulate,
        log_with="tensorboard",
        project_dir=folder.path,
        step_scheduler_with_optimizer=False,
    ) as accelerator:
        session = _prepare(config, folder, accelerator)
        done = _run(session)
    kept = "" if config.optim.keep == "best" else f"; kept: the last, epoch {done.epoch}"
    session.reporter.say(f"best validation accuracy: {done.best_top1:.4f} in epoch {done.best_epoch}{kept}")
    return TrainResult(folder.path, done.best_epoch, done.best_top1)


def _run(session: _Session) -> _Progress:
    """All epochs that are left."""
    config, reporter, folder = session.config, session.reporter, session.folder
    done = _resume(session) if config.resume else _Progress()
    if config.resume:
        reporter.say(f"resuming after epoch {done.epoch} of {config.optim.epochs}")
    try:
        while done.epoch < config.optim.epochs:
            done = _run_epoch(session, done)
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{error}; {_what_is_kept(folder)}") from None
    except KeyboardInterrupt:
        reporter.say(f"\ninterrupted; {_what_is_kept(folder)}")
        raise
    finally:
        skipped = read_skipped(folder.skipped)
        if skipped:
            reporter.say(f"{len(skipped)} unreadable image(s) were left out, listed in {folder.skipped}")
    return done


def _prepare(config: TrainConfig, folder: RunFolder, accelerator: Accelerator) -> _Session:
    """Check everything else, then create the run's folder and wrap the model."""
    reporter = Reporter(accelerator.is_main_process)
    set_seed(config.seed)
    batch_size = _batch_per_process(config, accelerator.num_processes)

    model, _ = build_model(config, None)
    splits = open_splits(config.data, input_spec(model).mode, folder.skipped)
    model, model_args = build_model(config, len(splits.class_names))
    spec = input_spec(model, config.model.image_size)
    optimizer = make_optimizer(model, config.optim)
    train_loader = make_loader(splits.train, spec, config.data, batch_size, train=True, seed=config.seed)
    val_loader = make_loader(splits.val, spec, config.data, batch_size, train=False)
    _check_loader(train_loader, batch_size, accelerator.num_processes)

    if accelerator.is_main_process:
        folder.start(config)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tensorboard")

    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":  # torch has it for GPUs only
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ema = None
    if config.optim.ema_decay is not None:
        ema = ModelEmaV3(model, decay=config.optim.ema_decay, use_warmup=True, device=accelerator.device)
    if config.engine.compile:
        model.compile()
    parameters = sum(p.numel() for p in model.parameters())
    reporter.say(
        f"{config.model.name}: {parameters:,} parameters; {config.data.name}: "
        f"{len(train_loader.dataset):,} training and {len(val_loader.dataset):,} validation images, "  # type: ignore[arg-type]
        f"{len(splits.class_names)} classes; device {accelerator.device}; folder {folder.path}"
    )
    model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_loader, val_loader)
    steps_per_epoch = -(-len(train_loader) // config.engine.accumulate)
    scheduler = make_scheduler(optimizer, config.optim, steps_per_epoch)
    description = {
        "model": config.model.name,
        "model_args": model_args,
        "class_names": splits.class_names,
        "input": spec._asdict(),
        "config": to_dict(config),
        "cbsa_torch": __version__,
    }
    return _Session(
        config,
        folder,
        accelerator,
        reporter,
        model,
        ema,
        optimizer,
        scheduler,
        train_loader,
        val_loader,
        description,
    )


def _batch_per_process(config: TrainConfig, processes: int) -> int:
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


def _run_epoch(session: _Session, done: _Progress) -> _Progress:
    """Train, validate, save, report; returns the new progress."""
    config, accelerator, folder = session.config, session.accelerator, session.folder
    epoch, epochs = done.epoch + 1, config.optim.epochs
    batches = len(session.train_loader)
    set_epoch(session.train_loader, epoch)
    start = time.monotonic()
    with session.reporter.bar(f"epoch {epoch}/{epochs}", batches) as advance:
        trained, step = train_one_epoch(
            accelerator,
            session.model,
            session.train_loader,
            session.optimizer,
            session.scheduler,
            config.optim,
            epoch=epoch,
            step=done.step,
            ema=session.ema,
            advance=advance,
        )
    seconds = time.monotonic() - start
    # The average is not wrapped, and the same on every process.
    candidate = session.bare_model if session.ema is None else session.ema.module
    num_classes = len(session.description["class_names"])
    with session.reporter.bar("validating", len(session.val_loader)) as advance:
        result = evaluate(accelerator, candidate, session.val_loader, num_classes, advance)
    if not math.isfinite(result.loss):
        raise NonFiniteLossError(f"the validation loss became {result.loss} after epoch {epoch}")

    best = result.top1 > done.best_top1
    now = _Progress(epoch, step, epoch if best else done.best_epoch, result.top1 if best else done.best_top1)
    measured = {
        "train_loss": trained.loss,
        "lr": trained.lr,
        "val_loss": result.loss,
        "val_top1": result.top1,
        "images_per_second": batches * config.optim.batch_size / config.engine.accumulate / seconds,
    }
    accelerator.log(measured, step=epoch)
    if accelerator.is_main_process:
        if best or config.optim.keep == "last":
            info = {**session.description, "epoch": epoch, "val_top1": result.top1}
            save_checkpoint(folder.weights, candidate, info)
        folder.append_metrics({"epoch": epoch, "step": step, **measured})
        save_state(folder.last, _state(session, now))
    accelerator.wait_for_everyone()
    session.reporter.say(
        f"epoch {epoch:>3}/{epochs}  loss {trained.loss:.3f}  val loss {result.loss:.3f}  "
        f"val accuracy {result.top1:.4f}{' *' if best else '  '} lr {trained.lr:.1e}  {seconds:.1f} s"
    )
    return now


def _state(session: _Session, progress: _Progress) -> dict[str, Any]:
    """What ``last.pt`` holds."""
    return {
        "progress": progress._asdict(),
        "model": session.bare_model.state_dict(),
        "ema": None if session.ema is None else session.ema.module.state_dict(),
        "optimizer": session.optimizer.state_dict(),
        "random": random_states(),
    }


def _resume(session: _Session) -> _Progress:
    """Load the last state, or start over if the run died before its first."""
    folder = session.folder
    done = _Progress()
    if folder.last.exists():
        state = load_state(folder.last)
        try:
            load_strictly(session.bare_model, state["model"], str(folder.last))
            if session.ema is not None:
                load_strictly(session.ema.module, state["ema"], str(folder.last))
            session.optimizer.load_state_dict(state["optimizer"])
            done = _Progress(**state["progress"])
            restore_random_states(state["random"])
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder.last} does not fit this run: {error}") from error
    if session.accelerator.is_main_process:
        folder.keep_metrics_until(done.epoch)
    return done


def _what_is_kept(folder: RunFolder) -> str:
    """What an interrupted run has left, as its files tell: memory may be ahead of them or behind."""
    if not folder.last.exists():
        return "there is no checkpoint yet"
    done = _Progress(**load_state(folder.last)["progress"])
    return (
        f"the last checkpoint is that of epoch {done.epoch}, the best epoch was {done.best_epoch}; "
        f"go on with: cbsa train --output {folder.path} --resume"
    )
