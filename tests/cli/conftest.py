"""Runs that all commands are tried on; tests must not change their models."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cbsa_torch.cli import main
from tests.helpers.colour_folder import write_colours

TINY = [
    *("--optim.batch-size", "256", "--optim.warmup-epochs", "0", "--optim.epochs", "1", "--data.workers", "0"),
    *("--model.args", "embed_dim", "8", "depth", "1", "num_heads", "2"),
]


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Options of a model that trains in a second."""
    return TINY


def train(folder: Path, *options: str) -> Path:
    assert main(["train", "--output", str(folder), *TINY, *options]) == 0
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """CBSA on the digits."""
    return train(tmp_path_factory.mktemp("runs") / "cbt")


@pytest.fixture(scope="session")
def trained_vit(tmp_path_factory) -> Path:
    """Softmax attention on the digits."""
    return train(tmp_path_factory.mktemp("runs") / "stem_vit", "--model", "stem_vit_pico_patch1_8")


@pytest.fixture(scope="session")
def colours(tmp_path_factory) -> Path:
    """An image folder with nothing but a train split."""
    root = tmp_path_factory.mktemp("colours")
    for i, name in enumerate(("dark", "light")):
        (root / "train" / name).mkdir(parents=True)
        for j in range(10):
            Image.new("L", (8, 8), 180 * i + 5 * j).save(root / "train" / name / f"{j}.png")
    return root


@pytest.fixture(scope="session")
def trained_on_folder(colours, tmp_path_factory) -> Path:
    """CBSA on two classes of an image folder."""
    folder = tmp_path_factory.mktemp("runs") / "folder"
    options = ["--config", "folder", "--data.root", str(colours), "--optim.batch-size", "8"]
    return train(folder, *options, "--model", "cbt_pico_patch1_8")


@pytest.fixture(scope="session")
def colour_images(tmp_path_factory) -> Path:
    """An image folder of three colours, 32x32, with all splits."""
    return write_colours(tmp_path_factory.mktemp("colour_images"))


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a run, to be changed."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def digit(tmp_path) -> Path:
    path = tmp_path / "digit.png"
    Image.fromarray(np.round(load_digits().images[0] * (255 / 16)).astype(np.uint8)).save(path)
    return path
