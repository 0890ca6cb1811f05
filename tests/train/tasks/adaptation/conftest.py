"""A small ViT that was trained on the digits, and configurations that adapt it within seconds."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from cbsa_torch.train import train
from cbsa_torch.train.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, TrainConfig
from cbsa_torch.train.losses import DistillConfig
from cbsa_torch.train.tasks.adaptation.task import AdaptedModelConfig, AdaptTrainConfig

VIT = {"patch_size": "2", "in_chans": "1", "embed_dim": "48", "depth": "3", "num_heads": "3"}


def optim(**values) -> OptimConfig:
    settings = {"name": "adamw", "lr": 1e-3, "batch_size": 256, "epochs": 1, "warmup_epochs": 0}
    return OptimConfig(**{**settings, "label_smoothing": 0.0, **values})


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> Path:
    """The folder of its run; tests must not change it."""
    config = TrainConfig(
        output=str(tmp_path_factory.mktemp("vit") / "run"),
        model=ModelConfig("vit_tiny_patch16_224", image_size=8, args=dict(VIT)),
        data=DataConfig(name="digits", workers=0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0),
        optim=optim(batch_size=128, epochs=2),
        engine=EngineConfig(cpu=True, tracker="none"),
    )
    return train(config).folder


@pytest.fixture
def config(vit, tmp_path) -> AdaptTrainConfig:
    """One epoch of CBSA*, with a teacher of both kinds."""
    return copy.deepcopy(
        AdaptTrainConfig(
            output=str(tmp_path / "adapted"),
            model=AdaptedModelConfig(original=str(vit), args={"num_representatives": "4"}),
            data=DataConfig(name="digits", workers=0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0),
            optim=optim(),
            engine=EngineConfig(cpu=True, tracker="none"),
            distill=DistillConfig(logits=0.5, features=0.5),
        )
    )
