"""Configurations that train within a second, and runs that were trained once."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest

from cbsa_torch.train.config import TrainConfig
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.trainer import TrainResult, train
from tests.helpers.colour_folder import tiny_config, write_colours


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with train, val and test: 24, 12 and 12 images of three classes."""
    return write_colours(tmp_path / "images")


@pytest.fixture
def config(images: Path, tmp_path: Path) -> TrainConfig:
    """Two epochs of three steps with a model of a few thousand parameters."""
    return tiny_config(images, tmp_path / "run")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, TrainResult]:
    """A run that learned the colours; tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    config = tiny_config(write_colours(folder / "images"), folder / "run")
    config.seed, config.optim.lr, config.optim.epochs = 1, 1e-2, 25
    return config, train(copy.deepcopy(config))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """What ``config`` trains when nothing happens; tests must not change it."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_config(write_colours(folder / "images"), folder / "run")
    train(copy.deepcopy(config))
    return config


@pytest.fixture
def run(config: TrainConfig, whole: TrainConfig) -> RunFolder:
    """The folder of ``config`` after its training, to be changed."""
    shutil.copytree(whole.output, config.output)
    folder = RunFolder(config.output)
    folder.describe(config)
    return folder
