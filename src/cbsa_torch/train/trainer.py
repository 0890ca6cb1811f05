"""Train a classifier from a configuration: everything in the order it happens."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import cbsa_torch.models  # noqa: F401  (registers our models with timm)
from cbsa_torch._core.checks import nearest
from cbsa_torch._version import __version__
from cbsa_torch.models.checkpoint import CheckpointError, load_checkpoint, load_strictly, save_checkpoint
from cbsa_torch.train.checkpoint import load_state, random_states, restore_random_states, save_state
from cbsa_torch.train.config import TrainConfig, check_config, to_dict
from cbsa_torch.train.data import InputSpec, Splits, input_spec, make_loader, open_splits, read_skipped
from cbsa_torch.train.errors import ConfigError, DataError, NonFiniteLossError
from cbsa_torch.train.loop import Evaluation, evaluate, new_accelerator, train_one_epoch
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


def train(config: TrainConfig) -> TrainResult:
    """Train as configured, into the folder ``config.output``.

    Everything that can be refused is refused before the folder is touched. After every epoch the state is
    saved, so an interrupted run continues from there with ``resume=True``.
    """
    check_config(config)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    folder = RunFolder(config.output)
    folder.check(config)
    accelerator = new_accelerator(
        mixed_precision=config.engine.precision,
        cpu=config.engine.cpu,
        gradient_accumulation_steps=config.engine.accumulate,
        log_with="tensorboard",
        project_dir=folder.path,
        step_scheduler_with_optimizer=False,
    )
    reporter = Reporter(accelerator.is_main_process)
    set_seed(config.seed)
    per_process = per_process_batch(config, accelerator.num_processes)

    model, model_args = build_model(config, None)
    splits = open_splits(config.data, input_spec(model).mode, folder.skipped)
    model, model_args = build_model(config, len(splits.class_names))
    spec = input_spec(model, config.model.image_size)
    optimizer = make_optimizer(model, config.optim)
    train_loader = make_loader(splits.train, spec, config.data, per_process, train=True)
    val_loader = make_loader(splits.val, spec, config.data, per_process, train=False)

    _check_loader(train_loader, per_process, accelerator.num_processes)

    if accelerator.is_main_process:
        folder.start(config)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tensorboard")

    if accelerator.num_processes > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ema = None
    if config.optim.ema_decay is not None:
        ema = ModelEmaV3(model, decay=config.optim.ema_decay, use_warmup=True, device=accelerator.device)
    if config.engine.compile:
        model.compile()
    model, optimizer, train_loader, val_loader = accelerator.prepare(model, optimizer, train_loader, val_loader)
    steps_per_epoch = -(-len(train_loader) // config.engine.accumulate)
    scheduler = make_scheduler(optimizer, config.optim, steps_per_epoch)
    done = _resume(config, folder, accelerator, model, optimizer, ema) if config.resume else _Progress()

    parameters = sum(p.numel() for p in model.parameters())
    reporter.say(
        f"{config.model.name}: {parameters:,} parameters; {config.data.name}: "
        f"{len(train_loader.dataset):,} training and {len(val_loader.dataset):,} validation images, "
        f"{len(splits.class_names)} classes; device {accelerator.device}; folder {folder.path}"
    )
    if config.resume:
        reporter.say(f"resuming after epoch {done.epoch} of {config.optim.epochs}")
    try:
        for epoch in range(done.epoch + 1, config.optim.epochs + 1):
            start = time.monotonic()
            with reporter.bar(f"epoch {epoch}/{config.optim.epochs}", len(train_loader)) as advance:
                trained, step = train_one_epoch(
                    accelerator, model, train_loader, optimizer, scheduler, config.optim,
                    epoch=epoch, step=done.step, ema=ema, advance=advance,
                )  # fmt: skip
            seconds = time.monotonic() - start
            # The average is the model's own architecture: unwrapped, and the same on every process.
            candidate = accelerator.unwrap_model(model) if ema is None else ema.module
            with reporter.bar("validating", len(val_loader)) as advance:
                result = evaluate(accelerator, candidate, val_loader, len(splits.class_names), advance)
            if not math.isfinite(result.loss):
                raise NonFiniteLossError(f"the validation loss became {result.loss} after epoch {epoch}")
            best = result.top1 > done.best_top1
            now = _Progress(
                epoch,
                step,
                epoch if best else done.best_epoch,
                result.top1 if best else done.best_top1,
            )
            row = {
                "epoch": epoch,
                "step": step,
                "train_loss": trained.loss,
                "lr": trained.lr,
                "val_loss": result.loss,
                "val_top1": result.top1,
                "images_per_second": len(train_loader) * per_process * accelerator.num_processes / seconds,
            }
            accelerator.log({k: v for k, v in row.items() if k not in ("epoch", "step")}, step=epoch)
            if accelerator.is_main_process:
                if best or config.optim.keep == "last":
                    info = _describe(config, model_args, spec, splits, now, result)
                    save_checkpoint(folder.weights, candidate, info)
                folder.append_metrics(row)
                save_state(folder.last, _state(now, accelerator.unwrap_model(model), optimizer, ema))
            accelerator.wait_for_everyone()
            done = now
            reporter.say(
                f"epoch {epoch:>3}/{config.optim.epochs}  loss {trained.loss:.3f}  "
                f"val loss {result.loss:.3f}  val accuracy {result.top1:.4f}{' *' if best else '  '} "
                f"lr {trained.lr:.1e}  {seconds:.1f} s"
            )
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{error}; {_what_is_kept(folder, done)}") from None
    except KeyboardInterrupt:
        reporter.say(f"\ninterrupted in epoch {done.epoch + 1}; {_what_is_kept(folder, done)}")
        raise
    finally:
        accelerator.end_training()
        skipped = read_skipped(folder.skipped)
        if skipped:
            reporter.say(f"{len(skipped)} unreadable image(s) were left out, listed in {folder.skipped}")
    reporter.say(f"best validation accuracy: {done.best_top1:.4f} in epoch {done.best_epoch}")
    return TrainResult(folder.path, done.best_epoch, done.best_top1)


def per_process_batch(config: TrainConfig, processes: int) -> int:
    """Images per forward pass of one process; the configured batch must divide."""
    parts = processes * config.engine.accumulate
    if config.optim.batch_size % parts:
        raise ConfigError(
            f"optim.batch_size ({config.optim.batch_size}) must be divisible by processes x accumulation "
            f"steps ({processes} x {config.engine.accumulate})"
        )
    return config.optim.batch_size // parts


def _check_loader(loader: DataLoader[Any], batch_size: int, processes: int) -> None:
    if len(loader) < processes:
        raise DataError(
            f"{len(loader.dataset)} training images are fewer than one batch of {batch_size} for each of "  # type: ignore[arg-type]
            f"{processes} process(es); lower optim.batch_size"
        )
    if isinstance(loader.dataset, IterableDataset) and processes > 1:
        raise ConfigError("data sets that stream (wds, tfds, hfids) are trained in one process for now")


def build_model(config: TrainConfig, num_classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """The configured model and the constructor arguments that rebuild it."""
    settings = config.model
    if settings.init_from is not None:
        return _build_from_checkpoint(config, num_classes)
    known = timm.list_models()
    if settings.name not in known:
        raise ConfigError(f"no model {settings.name!r} in timm{nearest(settings.name, known)}")
    args: dict[str, Any] = {key: yaml.safe_load(value) for key, value in settings.args.items()}
    if settings.image_size is not None:
        args["img_size"] = settings.image_size
    if num_classes is not None:
        args["num_classes"] = num_classes
    try:
        return timm.create_model(settings.name, **args), args
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"cannot build {settings.name} with {args}: {error}") from error


def _build_from_checkpoint(config: TrainConfig, num_classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """A trained model, with a new head and another image size where asked for."""
    settings = config.model
    path = Path(settings.init_from or "")
    model, info = load_checkpoint(RunFolder(path).weights if path.is_dir() else path)
    if info["model"] != settings.name:
        raise ConfigError(
            f"model.init_from {path} holds {info['model']!r}, but model.name is {settings.name!r}"
        )
    if settings.args:
        raise ConfigError("model.args cannot be changed together with model.init_from")
    args = dict(info["model_args"])
    if num_classes is not None and num_classes != args.get("num_classes"):
        model.reset_classifier(num_classes)  # type: ignore[operator]
        args["num_classes"] = num_classes
    if settings.image_size is not None:
        model.set_input_size(img_size=settings.image_size)  # type: ignore[operator]
        args["img_size"] = settings.image_size
    return model, args


def _describe(
    config: TrainConfig,
    model_args: dict[str, Any],
    spec: InputSpec,
    splits: Splits,
    done: _Progress,
    result: Evaluation,
) -> dict[str, Any]:
    """What a checkpoint says about itself: enough to rebuild, feed and judge the model."""
    return {
        "model": config.model.name,
        "model_args": model_args,
        "class_names": splits.class_names,
        "input": spec._asdict(),
        "config": to_dict(config),
        "epoch": done.epoch,
        "val_top1": result.top1,
        "cbsa_torch": __version__,
    }


def _state(
    done: _Progress, model: nn.Module, optimizer: torch.optim.Optimizer, ema: ModelEmaV3 | None
) -> dict[str, Any]:
    return {
        "progress": done._asdict(),
        "model": model.state_dict(),
        "ema": None if ema is None else ema.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": random_states(),
    }


def _resume(
    config: TrainConfig,
    folder: RunFolder,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: ModelEmaV3 | None,
) -> _Progress:
    """Load the last state, or start over if the run died before its first."""
    if not folder.last.exists():
        if accelerator.is_main_process:
            folder.keep_metrics_until(0)
        return _Progress()
    state = load_state(folder.last)
    try:
        load_strictly(accelerator.unwrap_model(model), state["model"], str(folder.last))
        if ema is not None:
            load_strictly(ema.module, state["ema"], str(folder.last))
        optimizer.load_state_dict(state["optimizer"])
        done = _Progress(**state["progress"])
        restore_random_states(state["random"])
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder.last} does not fit this run: {error}") from error
    if accelerator.is_main_process:
        folder.keep_metrics_until(done.epoch)
    return done


def _what_is_kept(folder: RunFolder, done: _Progress) -> str:
    if done.epoch == 0:
        return "there is no checkpoint yet"
    return (
        f"the last checkpoint is that of epoch {done.epoch}, the best epoch was {done.best_epoch}; "
        f"go on with: cbsa train --output {folder.path} --resume"
    )
