"""Train from a configuration, whatever the task: everything in the order it happens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, gather_object

from cbsa_torch._core.files import write_atomically
from cbsa_torch.models.checkpoint import CheckpointError, check_fit, save_tensors
from cbsa_torch.train.card import model_card
from cbsa_torch.train.config.base import RunConfig
from cbsa_torch.train.config.checks import check_config
from cbsa_torch.train.data import read_skipped
from cbsa_torch.train.engine.accelerate import new_accelerator, start_epoch, training_settings
from cbsa_torch.train.engine.tracking import check_tracker, finish_trackers, log, tracker_names
from cbsa_torch.train.errors import DataError, InterruptedRun, NonFiniteLossError
from cbsa_torch.train.loop import Progress, train_one_epoch
from cbsa_torch.train.registry import task_of
from cbsa_torch.train.run.folder import RunFolder, describe_last_checkpoint
from cbsa_torch.train.run.signals import StopRequests
from cbsa_torch.train.run.state import (
    check_finite,
    compare_data,
    load_state,
    model_state,
    optimizer_state,
    random_states,
    restore,
    restore_random_states,
)
from cbsa_torch.train.session import Session, prepare
from cbsa_torch.train.tasks.base import EvalResult


class TrainResult(NamedTuple):
    """The outcome of a run."""

    folder: Path
    best_epoch: int
    best_score: float
    """What was measured on validation after the best epoch: accuracy, or mean IoU."""


def train(config: RunConfig) -> TrainResult:
    """Train as configured, into the folder ``config.output``; a run that is there already is continued.

    Everything that can be refused is refused before the folder is touched. The state is saved after every
    epoch, every ``engine.checkpoint_steps`` optimiser steps, and when a signal asks to stop.

    Raises:
        ConfigError, DataError, RunFolderError, CheckpointError: what was asked for cannot work.
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint is from before.
        InterruptedRun: SIGINT or SIGTERM came; the state was saved, and calling again goes on from there.
    """
    check_config(config)
    task = task_of(config)
    task.check()
    check_tracker(config.engine.tracker)
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    folder = RunFolder(config.output)
    changes = folder.check(config)
    settings = training_settings(config.engine, config.seed)
    accelerator = new_accelerator(
        log_with=tracker_names(config.engine.tracker), project_dir=folder.path, **settings
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
    progress = _resume(session)
    try:
        while progress.epoch < config.optim.epochs:
            _run_epoch(session, progress)
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{error}; {describe_last_checkpoint(folder)}") from None
    except OSError as error:
        raise OSError(f"{error}; {describe_last_checkpoint(folder)}") from error
    except KeyboardInterrupt:
        reporter.say(f"\ninterrupted; {describe_last_checkpoint(folder)}")
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
        loader = start_epoch(session.accelerator, session.train_loader, progress.epoch, progress.batch)
        with session.reporter.bar(f"epoch {epoch}/{epochs}", len(loader)) as advance:
            train_one_epoch(
                session,
                progress,
                loader,
                after_step=lambda stop: _after_step(session, progress, stop),
                advance=advance,
            )
    if progress.targets == 0:
        raise DataError(f"no training image of epoch {epoch} could be read{_listed(session.folder)}")
    check_finite(session.accelerator, session.model, progress.step)
    result = _validate(session, progress)
    if result.images == 0:
        raise DataError(f"no image of the validation split could be read{_listed(session.folder)}")
    if not math.isfinite(result.loss):
        raise NonFiniteLossError(f"the validation loss became {result.loss} after epoch {epoch}")

    task = session.task
    best = result.score > progress.best_score
    if best:
        progress.best_epoch, progress.best_score = epoch, result.score
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
        _save_weights(session, epoch, result.score)
    _save_state(session, progress)
    session.reporter.say(
        f"epoch {epoch:>3}/{epochs}  loss {row['train_loss']:.3f}  val loss {result.loss:.3f}  "
        f"val {task.score_title} {result.score:.4f}{' *' if best else '  '} lr {progress.lr:.1e}  "
        f"{seconds:.1f} s  {row['images_per_second']:.0f} images/s "
        f"({100 * row['data_wait']:.0f} % waiting for data)"
    )
    if _anyone_asks_to_stop(session) and progress.epoch < epochs:
        _stop(session)


def _validate(session: Session, progress: Progress) -> EvalResult:
    """Evaluate; asked to stop, save where the run is and stop."""

    def before_batch() -> None:
        if _anyone_asks_to_stop(session):
            _save_state(session, progress)
            _stop(session)

    with session.reporter.bar("validating", len(session.val_loader)) as advance:
        return session.task.evaluate(
            session.accelerator,
            session.eval_model,
            session.val_loader,
            session.description["class_names"],
            advance=advance,
            before_batch=before_batch,
        )


def _after_step(session: Session, progress: Progress, stop: bool) -> None:
    """Save the state where the configuration or a signal asks for it."""
    every = session.config.engine.checkpoint_steps
    if stop or (every is not None and progress.step % every == 0):
        check_finite(session.accelerator, session.model, progress.step)
        _save_state(session, progress)
    if stop:
        _stop(session)


def _anyone_asks_to_stop(session: Session) -> bool:
    """Whether any process was asked to stop; to be called on every process."""
    flag = torch.tensor(float(bool(session.stop)), device=session.accelerator.device)
    return bool(session.accelerator.reduce(flag) > 0)


def _stop(session: Session) -> None:
    name = "another process" if session.stop.received is None else session.stop.received.name
    raise InterruptedRun(f"stopped by {name}; {describe_last_checkpoint(session.folder)}")


def _save_weights(session: Session, epoch: int, score: float) -> None:
    """Write the weights file; called on every process, written by one."""
    state = model_state(session.eval_model)
    if session.accelerator.is_main_process:
        info = {**session.description, "epoch": epoch, session.task.score: score}
        save_tensors(session.folder.weights, state, info)
        card = model_card(info, session.folder.read_metrics())
        write_atomically(session.folder.card, card.encode())


def _save_state(session: Session, progress: Progress) -> None:
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
        session.folder.states(session.config.engine.keep_checkpoints).save(progress.step, state)
    accelerator.wait_for_everyone()


def _resume(session: Session) -> Progress:
    """Load the newest state that is whole, or start over if the run died before its first."""
    folder, accelerator, reporter = session.folder, session.accelerator, session.reporter
    found: list[Any] = [None, [], None]
    if accelerator.is_main_process:
        try:
            found = [*folder.states().newest(), None]
        except CheckpointError as error:
            found[2] = str(error)
    path, problems, failure = broadcast_object_list(found)  # the same for every process
    if failure is not None:
        raise CheckpointError(failure)
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
    state = load_state(path)
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


def _listed(folder: RunFolder) -> str:
    return f"; they are listed in {folder.skipped}" if folder.skipped.exists() else ""
