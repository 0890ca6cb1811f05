"""A tiny image folder whose classes are colours, and configurations that train on it in a second."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cbsa_torch.train.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, TrainConfig
from cbsa_torch.train.trainer import TrainResult, train

COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 60, 40)}
COUNTS = {"train": 8, "val": 4, "test": 4}


def write_class(folder: Path, name: str, count: int, seed: int = 0) -> None:
    """Write ``count`` noisy 32x32 images of one colour."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        pixels = np.array(COLOURS[name]) + generator.integers(-30, 30, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}_{i}.png")


def write_split(folder: Path, count: int, names: tuple[str, ...] = tuple(COLOURS), seed: int = 0) -> None:
    for i, name in enumerate(names):
        write_class(folder / name, name, count, seed=100 * seed + i)


@pytest.fixture
def make_split() -> Callable[..., None]:
    return write_split


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with train, val and test: 24, 12 and 12 images of three classes."""
    root = tmp_path / "images"
    for i, (split, count) in enumerate(COUNTS.items()):
        write_split(root / split, count, seed=i)
    return root


def tiny_config(root: Path, output: Path) -> TrainConfig:
    return TrainConfig(
        output=str(output),
        model=ModelConfig(
            name="cbt_nano_patch4_32",
            args={"embed_dim": "16", "depth": "1", "num_heads": "2", "num_representatives": "4"},
        ),
        data=DataConfig(name="folder", root=str(root), workers=0, crop_scale=(0.5, 1.0)),
        optim=OptimConfig(
            name="adamw", lr=3e-3, batch_size=8, epochs=2, warmup_epochs=0, label_smoothing=0.0, ema_decay=None
        ),
        engine=EngineConfig(cpu=True),
    )


@pytest.fixture
def config(images: Path, tmp_path: Path) -> TrainConfig:
    """Two epochs of three steps with a model of a few thousand parameters."""
    return tiny_config(images, tmp_path / "run")


@pytest.fixture
def digits_config(tmp_path: Path) -> TrainConfig:
    """One epoch of the digits."""
    config = tiny_config(tmp_path, tmp_path / "run")
    config.data = DataConfig(name="digits", workers=0, crop_scale=(0.7, 1.0), hflip=0.0)
    config.model.name = "cbt_pico_patch1_8"
    config.optim.batch_size, config.optim.epochs = 128, 1
    return config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, TrainResult]:
    """A run that learned the colours; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    for i, (split, count) in enumerate(COUNTS.items()):
        write_split(folder / "images" / split, count, seed=i)
    config = tiny_config(folder / "images", folder / "run")
    config.seed, config.optim.lr, config.optim.epochs = 1, 1e-2, 25
    return config, train(copy.deepcopy(config))


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Read every file under a folder."""
    return lambda root: {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }
