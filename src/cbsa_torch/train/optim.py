"""timm's optimisers, schedules and weight averaging, from the configuration."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from cbsa_torch._core.checks import nearest
from cbsa_torch.train.config import OptimConfig
from cbsa_torch.train.errors import ConfigError


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser, with weight decay on matrices only unless ``decay_everything``."""
    known = list_optimizers()
    if config.name not in known:
        raise ConfigError(
            f"optim.name must be an optimiser of timm, got {config.name!r}{nearest(config.name, known)}"
        )
    return create_optimizer_v2(
        # given the model, timm asks it which parameters should not decay
        model.parameters() if config.decay_everything else model,
        opt=config.name,
        lr=config.lr,
        weight_decay=config.weight_decay,
    )


def make_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, steps_per_epoch: int) -> Any:
    """Linear warm-up, then a cosine; a function of the step number alone, hence resumable."""
    warmup = min(config.warmup_epochs, config.epochs)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=max(config.epochs - warmup, 1),
        warmup_epochs=warmup,
        warmup_prefix=True,  # the cosine starts from lr, after the warm-up
        warmup_lr=min(config.warmup_lr, config.lr),
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler
