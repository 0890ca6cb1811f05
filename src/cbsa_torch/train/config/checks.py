"""Which values of a configuration can work: rules that are checked before anything is read or written."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from cbsa_torch.train.config.base import DataConfig, RunConfig, to_dict
from cbsa_torch.train.errors import ConfigError


def check_numbers(values: dict[str, Any], prefix: str = "") -> None:
    """Refuse numbers that are not finite, wherever they are; raises ConfigError with the key."""
    for key, value in values.items():
        if isinstance(value, dict):
            check_numbers(value, f"{prefix}{key}.")
            continue
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise ConfigError(f"{prefix}{key} must be finite, got {item}")


def check_rules(rules: Iterable[tuple[bool, str, Any]]) -> None:
    """Raise ConfigError for the first of (holds, rule, got) that does not hold."""
    for holds, rule, got in rules:
        if not holds:
            raise ConfigError(f"{rule}, got {got}")


def check_config(config: RunConfig) -> None:
    """Refuse values that cannot work, before anything is read or written; the data are the task's to check."""
    check_numbers(to_dict(config))
    optim, data = config.optim, config.data
    threads, every, keep = config.engine.threads, config.engine.save_steps, config.engine.keep_states
    size, model = config.model.image_size, config.model
    check_rules([
        (0 <= config.seed < 2**31, "seed must be in [0, 2**31)", config.seed),
        (size is None or size >= 1, "model.image_size must be at least 1", size),
        (
            "num_classes" not in model.args,
            "model.args num_classes must be left out (the data gives the number of classes)",
            model.args.get("num_classes"),
        ),
        (
            size is None or "img_size" not in model.args,
            "model.args img_size must be left out beside model.image_size",
            model.args.get("img_size"),
        ),
        (optim.batch_size >= 1, "optim.batch_size must be at least 1", optim.batch_size),
        (optim.epochs >= 1, "optim.epochs must be at least 1", optim.epochs),
        (optim.lr > 0, "optim.lr must be positive", optim.lr),
        (optim.weight_decay >= 0, "optim.weight_decay must not be negative", optim.weight_decay),
        (optim.warmup_epochs >= 0, "optim.warmup_epochs must not be negative", optim.warmup_epochs),
        (0 <= optim.label_smoothing < 1, "optim.label_smoothing must be in [0, 1)", optim.label_smoothing),
        (
            optim.ema_decay is None or 0 < optim.ema_decay < 1,
            "optim.ema_decay must be in (0, 1)",
            optim.ema_decay,
        ),
        (optim.poly_power > 0, "optim.poly_power must be positive", optim.poly_power),
        (0 <= data.workers <= 1024, "data.workers must be in [0, 1024]", data.workers),
        (data.max_bad_images >= 0, "data.max_bad_images must not be negative", data.max_bad_images),
        (0 <= optim.min_lr <= optim.lr, "optim.min_lr must be in [0, optim.lr]", optim.min_lr),
        (optim.warmup_lr >= 0, "optim.warmup_lr must not be negative", optim.warmup_lr),
        (optim.clip_grad is None or optim.clip_grad > 0, "optim.clip_grad must be positive", optim.clip_grad),
        (threads is None or 1 <= threads <= 4096, "engine.threads must be in [1, 4096]", threads),
        (config.engine.accumulate >= 1, "engine.accumulate must be at least 1", config.engine.accumulate),
        (keep >= 1, "engine.keep_states must be at least 1", keep),
        (every is None or every >= 1, "engine.save_steps must be at least 1", every),
        (
            not (config.engine.fsdp and optim.ema_decay is not None),
            "optim.ema_decay must be unset with engine.fsdp (sharded weights are not averaged)",
            optim.ema_decay,
        ),
        (not (config.resume and config.overwrite), "resume and overwrite exclude each other", "both"),
    ])  # fmt: skip


def check_images(data: DataConfig) -> None:
    """Refuse settings of a classifier's images that cannot work."""
    scale, ratio = data.crop_scale, data.crop_ratio
    check_rules([
        (0 <= data.color_jitter <= 10, "data.color_jitter must be in [0, 10]", data.color_jitter),
        (0 < data.val_fraction < 1, "data.val_fraction must be in (0, 1)", data.val_fraction),
        (0 < scale[0] <= scale[1] <= 1, "data.crop_scale must rise in (0, 1]", scale),
        (0 < ratio[0] <= ratio[1], "data.crop_ratio must rise above 0", ratio),
        (0 <= data.hflip <= 1, "data.hflip must be in [0, 1]", data.hflip),
        (0 <= data.rotate <= 180, "data.rotate must be in [0, 180] degrees", data.rotate),
        (0 <= data.shift <= 1, "data.shift must be in [0, 1]", data.shift),
    ])  # fmt: skip
