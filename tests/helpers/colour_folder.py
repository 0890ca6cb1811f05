"""A tiny image folder whose classes are colours, and configurations that train within a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cbsa_torch.train.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, TrainConfig

COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 60, 40)}
COUNTS = {"train": 8, "val": 4, "test": 4}
"""Images of each class."""


def write_colours(root: Path) -> Path:
    """Write train, val and test: 24, 12 and 12 images of three classes."""
    for i, (split, count) in enumerate(COUNTS.items()):
        write_split(root / split, count, seed=i)
    return root


def write_split(folder: Path, count: int, names: tuple[str, ...] = tuple(COLOURS), seed: int = 0) -> None:
    """Write ``count`` noisy 32x32 images of each colour."""
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        generator = np.random.default_rng(100 * seed + i)
        for j in range(count):
            pixels = np.array(COLOURS[name]) + generator.integers(-30, 30, (32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{name}_{j}.png")


def tiny_config(root: Path, output: Path) -> TrainConfig:
    """Two epochs of three steps with a model of a few thousand parameters."""
    return TrainConfig(
        output=str(output),
        model=ModelConfig(
            name="cbt_nano_patch4_32",
            args={"embed_dim": 16, "depth": 1, "num_heads": 2, "num_representatives": 4},
        ),
        data=DataConfig(name="folder", root=str(root), workers=0, crop_scale=(0.5, 1.0)),
        optim=OptimConfig(
            name="adamw", lr=3e-3, batch_size=8, epochs=2, warmup_epochs=0, label_smoothing=0.0, ema_decay=None
        ),
        engine=EngineConfig(cpu=True),
    )


def digits_config(output: Path) -> TrainConfig:
    """One epoch of the digits."""
    config = tiny_config(output.parent, output)
    config.data = DataConfig(name="digits", workers=0, crop_scale=(0.7, 1.0), hflip=0.0)
    config.model.name = "cbt_pico_patch1_8"
    config.optim.batch_size, config.optim.epochs = 128, 1
    return config


def plain_vit(config: TrainConfig) -> None:
    """Change to a model and data without batch norm and random crops.

    A batch then sees the same images as its parts do, and gives the same gradient.
    """
    arguments = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 16}
    config.model = ModelConfig("vit_tiny_patch16_224", image_size=32, args=arguments)
    config.data.crop_scale, config.data.crop_ratio, config.data.hflip = (1.0, 1.0), (1.0, 1.0), 0.0
    config.optim.name, config.optim.lr = "sgd", 0.1
