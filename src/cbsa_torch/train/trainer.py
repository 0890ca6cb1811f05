"""Training from a configuration, whatever the task: epochs, steps, validation, in the order they happen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import DataLoaderConfiguration
from accelerate.utils import send_to_device
from torch import Tensor, nn

from cbsa_torch.train.config import RunConfig, check_config
from cbsa_torch.train.data import IGNORE, read_skipped, set_epoch
from cbsa_torch.train.engine.accelerate import new_accelerator, whole_inputs
from cbsa_torch.train.engine.tracking import check_tracker, finish_trackers, log, tracker_names
from cbsa_torch.train.errors import DataError, InterruptedRun, NonFiniteLossError
from cbsa_torch.train.registry import task_of
from cbsa_torch.train.run.folder import RunFolder, describe_last_state
from cbsa_torch.train.run.signals import StopRequests
from cbsa_torch.train.run.state import check_finite
from cbsa_torch.train.session import Progress, Session, prepare, resume, save_state, save_weights
from cbsa_torch.train.tasks.base import EvalResult


class TrainResult(NamedTuple):
    """The outcome of a run.

    Examples:
        >>> from cbsa_torch.train import TrainResult
        >>> TrainResult(folder="runs/new", best_epoch=3, best_score=0.98).best_score  # as train(config) returns
        0.98
    """

    folder: Path
    best_epoch: int
    best_score: float
    """What was measured on validation after the best epoch: accuracy, or mean IoU."""


def train(config: RunConfig) -> TrainResult:
    """Train as configured, into the folder ``config.output``; a run that is there already is continued.

    Everything that can be refused is refused before the folder is touched. The training state is saved after
    every epoch, every ``engine.save_steps`` optimiser steps, and when a signal asks to stop.

    Raises:
        ConfigError, DataError, RunFolderError, CheckpointError: what was asked for cannot work.
        NonFiniteLossError: the loss became NaN or infinite; the last training state is from before.
        InterruptedRun: SIGINT or SIGTERM came; the state was saved, and calling again goes on from there.

    Examples:
        >>> from cbsa_torch.train import DataConfig, ModelConfig, OptimConfig, TrainConfig, train
        >>> config = TrainConfig(
        ...     output="runs/new",
        ...     model=ModelConfig("cbt_pico_patch1_8", args={"depth": 1}),
        ...     data=DataConfig(root="photos", workers=0),
        ...     optim=OptimConfig("adamw", batch_size=12, epochs=1, warmup_epochs=0),
        ... )
        >>> train(config).folder
        classes: 3 (blue, green, red)
        ...
        best validation accuracy: ... in epoch 1
        PosixPath('runs/new')
    """
    check_config(config)
    task = task_of(config)
    task.check()
    check_tracker(config.engine.tracker)
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    folder = RunFolder(config.output)
    changes = folder.check(config)
    accelerator = new_accelerator(
        mixed_precision=config.engine.precision,
        cpu=config.engine.cpu,
        gradient_accumulation_steps=config.engine.accumulate,
        step_scheduler_with_optimizer=False,
        # the order of an epoch follows from the seed and its number alone
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        log_with=tracker_names(config.engine.tracker),
        project_dir=folder.path,
    )
    stop = StopRequests()
    try:
        session = prepare(task, folder, accelerator, stop)
        for line in changes:
            session.reporter.say(f"accepted change: {line}")
        try:
            with stop:  # after the trackers, which may set handlers of their own
                done = _run(session)
        finally:
            finish_trackers(accelerator, session.reporter.say)
    finally:
        folder.lock.release()
    kept = "" if config.optim.keep == "best" else f"; kept: the last, epoch {done.epoch}"
    session.reporter.say(
        f"best validation {task.score_title}: {done.best_score:.4f} in epoch {done.best_epoch}{kept}"
    )
    return TrainResult(folder.path, done.best_epoch, done.best_score)


def _run(session: Session) -> Progress:
    """All epochs that are left."""
    config, reporter, folder = session.config, session.reporter, session.folder
    progress = resume(session)
    try:
        while progress.epoch < config.optim.epochs:
            _run_epoch(session, progress)
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{error}; {describe_last_state(folder)}") from None
    except OSError as error:
        raise OSError(f"{error}; {describe_last_state(folder)}") from error
    except KeyboardInterrupt:
        reporter.say(f"\ninterrupted; {describe_last_state(folder)}")
        raise
    finally:
        skipped = read_skipped(folder.skipped)
        if skipped:
            reporter.say(f"{len(skipped)} unreadable image(s) were left out, listed in {folder.skipped}")
    return progress


def _run_epoch(session: Session, progress: Progress) -> None:
    """Train what is left of an epoch, validate, save, report."""
    config, epochs = session.config, session.config.optim.epochs
    epoch, batches = progress.epoch + 1, len(session.train_loader)
    if progress.batch < batches:
        loader = session.train_loader
        set_epoch(loader, progress.epoch)
        if progress.batch:  # those were seen already, and are not read again
            loader = session.accelerator.skip_first_batches(loader, progress.batch)
        with session.reporter.bar(f"epoch {epoch}/{epochs}", loader, len(loader)) as shown:
            train_one_epoch(session, progress, shown)
    if progress.targets == 0:
        raise DataError(f"no training image of epoch {epoch} could be read{_listed(session.folder)}")
    check_finite(session.accelerator, session.model, progress.step)
    result = _validate(session, progress)
    if result.images == 0:
        raise DataError(f"no image of the validation split could be read{_listed(session.folder)}")
    if not math.isfinite(result.loss):
        raise NonFiniteLossError(f"the validation loss became {result.loss} after epoch {epoch}")

    task = session.task
    best = (result.score, -result.loss) > (progress.best_score, -progress.best_loss)
    if best:
        progress.best_epoch, progress.best_score, progress.best_loss = epoch, result.score, result.loss
    seconds = max(progress.seconds, 1e-9)
    row = {
        "epoch": epoch,
        "step": progress.step,
        "train_loss": progress.loss / max(progress.targets, 1),
        "lr": progress.lr,
        "val_loss": result.loss,
        task.score: result.score,
        "images_per_second": progress.images / seconds,
        "data_wait": progress.waited / seconds,
    }
    progress.end_epoch()
    log(session.accelerator, {k: v for k, v in row.items() if k != "epoch"}, epoch, session.reporter.say)
    if session.accelerator.is_main_process:
        session.folder.append_metrics(row)
    if best or config.optim.keep == "last":
        save_weights(session, epoch, result.score)
    save_state(session, progress)
    session.reporter.say(
        f"epoch {epoch:>3}/{epochs}  loss {row['train_loss']:.3f}  val loss {result.loss:.3f}  "
        f"val {task.score_title} {result.score:.4f}{' *' if best else '  '} lr {progress.lr:.1e}  "
        f"{seconds:.1f} s  {row['images_per_second']:.0f} {task.unit}/s "
        f"({100 * row['data_wait']:.0f} % waiting for data)"
    )
    if _stop_requested(session) and progress.epoch < epochs:
        _raise_interrupted(session)


def train_one_epoch(session: Session, progress: Progress, batches: Iterable[Any]) -> None:
    """Train on the batches that are left of an epoch, saving the state where configuration or a signal ask.

    Args:
        session: the run.
        progress: counted on as the epoch goes.
        batches: of (images, targets).

    Raises:
        NonFiniteLossError: before the bad loss reaches the weights, on every process alike.
        InterruptedRun: any process was asked to stop; the state was saved.
    """
    accelerator, model, optimizer = session.accelerator, session.model, session.prepared_optimizer
    clip_grad = session.config.optim.clip_grad
    # Where the epoch begins in the schedule. progress.step also counts steps of other batch sizes, if the
    # configuration was changed between epochs.
    first_step = progress.epoch * session.steps_per_epoch
    model.train()
    parts: list[Tensor] = []
    before = time.perf_counter()
    for images, targets in batches:
        progress.waited += time.perf_counter() - before
        images, targets = send_to_device((images, targets), accelerator.device)
        # Parts of a step have equally many targets, but lists of images of several sizes
        part_size = targets.numel() if isinstance(images, Tensor) else 1
        with accelerator.accumulate(model):
            done = progress.batch // accelerator.gradient_accumulation_steps
            session.scheduler.step_update(first_step + done)
            loss = session.loss(model, images, targets)
            known = targets != IGNORE
            count, seen = known.sum(), known.reshape(len(known), -1).any(1).sum()
            parts.append(torch.stack([loss.detach() * count, count.to(loss.dtype), seen.to(loss.dtype)]))
            if accelerator.sync_gradients:
                # One exchange between the processes a step: sums, and whether one was asked to stop.
                flag = loss.new_tensor([float(bool(session.stop))])
                sums = _start_copy(accelerator.reduce(torch.cat([torch.stack(parts).sum(0), flag])))
                parts = []
            # Each part weighs as many targets as it has; how many the step has is known only at its end.
            accelerator.backward(loss * (count / part_size))
            progress.batch += 1
            if accelerator.sync_gradients:
                total, everyone, images_seen, stops = sums()
                if not math.isfinite(total):
                    raise NonFiniteLossError(
                        f"the loss became {total} in epoch {progress.epoch + 1}, batch {progress.batch}"
                    )
                nominal = part_size * accelerator.num_processes * accelerator.gradient_accumulation_steps
                _scale_gradients(model, nominal / max(everyone, 1))
                if clip_grad is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        progress.seconds += time.perf_counter() - before
        if accelerator.sync_gradients:
            # processes that share images have counted the same ones; how many do may change when a run goes on
            shared = session.config.engine.context_parallel
            progress.loss += total / shared
            progress.targets += everyone / shared
            progress.images += images_seen / shared
            progress.lr = optimizer.param_groups[0]["lr"]
            progress.step += 1
            if session.ema is not None:
                session.ema.update(accelerator.unwrap_model(model), step=progress.step)
            every = session.config.engine.save_steps
            if stops or (every is not None and progress.step % every == 0):
                check_finite(accelerator, model, progress.step)
                save_state(session, progress)
            if stops:
                _raise_interrupted(session)
        before = time.perf_counter()


def _start_copy(values: Tensor) -> Callable[[], list[float]]:
    """Start to copy numbers to the host; the function returned waits for them, not for what is queued later.

    So a GPU has the backward pass to work on while the host waits for the loss.
    """
    copy = values.to("cpu", non_blocking=values.is_cuda)
    there = torch.cuda.Event() if values.is_cuda else None
    if there is not None:
        there.record()

    def wait() -> list[float]:
        if there is not None:
            there.synchronize()
        numbers: list[float] = copy.double().tolist()
        return numbers

    return wait


def _scale_gradients(model: nn.Module, factor: float) -> None:
    """Make up for unreadable images, and for a last step of an epoch that has fewer parts."""
    if factor != 1:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def _validate(session: Session, progress: Progress) -> EvalResult:
    """Evaluate; asked to stop, save where the run is and stop."""

    def until_stopped() -> Iterator[Any]:
        for batch in session.val_loader:
            if _stop_requested(session):
                save_state(session, progress)
                _raise_interrupted(session)
            yield batch

    with session.reporter.bar("validating", until_stopped(), len(session.val_loader)) as batches:
        names = session.description["class_names"]
        with whole_inputs(session.eval_model):
            return session.task.evaluate(session.accelerator, session.eval_model, batches, names)


def _stop_requested(session: Session) -> bool:
    """Whether any process was asked to stop; to be called on every process."""
    flag = torch.tensor(float(bool(session.stop)), device=session.accelerator.device)
    return bool(session.accelerator.reduce(flag) > 0)


def _raise_interrupted(session: Session) -> None:
    name = "another process" if session.stop.received is None else session.stop.received.name
    raise InterruptedRun(f"stopped by {name}; {describe_last_state(session.folder)}")


def _listed(folder: RunFolder) -> str:
    return f"; they are listed in {folder.skipped}" if folder.skipped.exists() else ""
