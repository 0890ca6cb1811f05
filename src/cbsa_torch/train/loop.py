"""The loop: one epoch of training, of images or of pixels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cbsa_torch.train.data import IGNORE
from cbsa_torch.train.errors import NonFiniteLossError
from cbsa_torch.train.session import Session


@dataclass
class Progress:
    """How far a run is. With the weights and the generators it is all that going on needs."""

    epoch: int = 0
    """Epochs done, validation included."""
    step: int = 0
    """Optimiser steps done."""
    best_epoch: int = 0
    best_score: float = -1.0
    batch: int = 0
    """Batches done of the epoch under way; the rest is of these batches."""
    loss: float = 0.0
    """Sum of the training loss over the targets of all processes."""
    targets: float = 0.0
    """How many those were: images, or pixels."""
    images: float = 0.0
    """Images with at least one."""
    seconds: float = 0.0
    """Time spent on them by the main process."""
    waited: float = 0.0
    """Part of the time that went by until the data was there."""
    lr: float = 0.0
    """Learning rate of the last step."""

    def end_epoch(self) -> None:
        """Count the epoch under way as done."""
        self.epoch += 1
        self.batch, self.loss, self.targets, self.images, self.seconds, self.waited = 0, 0.0, 0.0, 0.0, 0.0, 0.0


def train_one_epoch(
    session: Session,
    progress: Progress,
    loader: Iterable[Any],
    *,
    after_step: Callable[[bool], None],
    advance: Callable[[], None],
) -> None:
    """Train on every batch of ``loader``, which holds those that ``progress`` says are left of the epoch.

    Args:
        session: the run.
        progress: counted on as the epoch goes.
        loader: of (images, targets).
        after_step: called after every optimiser step with whether any process was asked to stop; it may raise.
        advance: called after every batch (progress bar).

    Raises:
        NonFiniteLossError: before the bad loss reaches the weights, on every process alike.
    """
    accelerator, model, optimizer = session.accelerator, session.model, session.prepared_optimizer
    clip_grad = session.config.optim.clip_grad
    # Where the epoch begins in the schedule. progress.step also counts steps of other batch sizes, if the
    # configuration was changed between epochs.
    first_step = progress.epoch * session.steps_per_epoch
    model.train()
    parts: list[Tensor] = []
    before = time.perf_counter()
    for images, targets in _timed(loader, progress):
        images, targets = images.to(accelerator.device), targets.to(accelerator.device)
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
            accelerator.backward(loss * (count / targets.numel()))
            progress.batch += 1
            if accelerator.sync_gradients:
                total, everyone, images_seen, stops = sums()
                if not math.isfinite(total):
                    raise NonFiniteLossError(
                        f"the loss became {total} in epoch {progress.epoch + 1}, batch {progress.batch}"
                    )
                nominal = targets.numel() * accelerator.num_processes * accelerator.gradient_accumulation_steps
                _scale_gradients(model, nominal / max(everyone, 1))
                if clip_grad is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        progress.seconds += time.perf_counter() - before
        advance()
        if accelerator.sync_gradients:
            progress.loss += total
            progress.targets += everyone
            progress.images += images_seen
            progress.lr = optimizer.param_groups[0]["lr"]
            progress.step += 1
            if session.ema is not None:
                session.ema.update(accelerator.unwrap_model(model), step=progress.step)
            after_step(stops > 0)
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


def _timed(loader: Iterable[Any], progress: Progress) -> Iterator[Any]:
    """The batches, the time until each is there being counted."""
    batches = iter(loader)
    while True:
        start = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        progress.waited += time.perf_counter() - start
        yield batch
