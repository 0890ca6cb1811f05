"""A small ViT that was trained on the digits, and a configuration that adapts it within seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from cbsa_torch.train import train
from cbsa_torch.train.tasks.adaptation.task import AdaptTrainConfig
from tests.helpers.small_vit import adapt_config, vit_config


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> Path:
    """The folder of its run; tests must not change it."""
    return train(vit_config(tmp_path_factory.mktemp("vit") / "run")).folder


@pytest.fixture
def config(vit, tmp_path) -> AdaptTrainConfig:
    """One epoch of CBSA*, with a teacher of both kinds."""
    return adapt_config(vit, tmp_path / "adapted")
