"""A small ViT that trains on the digits, and a configuration that adapts it within seconds."""

from __future__ import annotations

from pathlib import Path

import timm

from cbsa_torch.models import load_checkpoint, save_checkpoint
from cbsa_torch.train.config import DataConfig, EngineConfig, ModelConfig, OptimConfig, TrainConfig
from cbsa_torch.train.losses import DistillConfig
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.adaptation.task import AdaptedModelConfig, AdaptTrainConfig


def _digits() -> DataConfig:
    return DataConfig(name="digits", workers=0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0)


def _optim(**values) -> OptimConfig:
    settings = {"name": "adamw", "lr": 1e-3, "batch_size": 256, "epochs": 1, "warmup_epochs": 0}
    return OptimConfig(**{**settings, "label_smoothing": 0.0, **values})


def vit_config(output: Path) -> TrainConfig:
    """Two epochs of a ViT."""
    args = {"patch_size": 2, "in_chans": 1, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return TrainConfig(
        output=str(output),
        model=ModelConfig("vit_tiny_patch16_224", image_size=8, args=args),
        data=_digits(),
        optim=_optim(batch_size=128, epochs=2),
        engine=EngineConfig(cpu=True, tracker="none"),
    )


def adapt_config(original: Path, output: Path) -> AdaptTrainConfig:
    """One epoch of CBSA*, with a teacher of both kinds."""
    return AdaptTrainConfig(
        output=str(output),
        model=AdaptedModelConfig(original=str(original), args={"num_representatives": 4}),
        data=_digits(),
        optim=_optim(),
        engine=EngineConfig(cpu=True, tracker="none"),
        distill=DistillConfig(logits=0.5, features=0.5),
    )


def untrained_like(folder: Path, path: Path, class_names: list[str] | None = None, **args) -> str:
    """Write a weights file that describes itself as that of a run does, but for some arguments or the classes."""
    info = load_checkpoint(RunFolder(folder).weights)[1]
    class_names = class_names or info["class_names"]
    info |= {
        "class_names": class_names,
        "model_args": {**info["model_args"], **args, "num_classes": len(class_names)},
    }
    save_checkpoint(path, timm.create_model(info["model"], **info["model_args"]), info)
    return str(path)
