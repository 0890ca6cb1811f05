"""A folder of small images with masks: squares of two colours on grey, each image of a size of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cbsa_torch.train.config import EngineConfig, OptimConfig
from cbsa_torch.train.tasks.segmentation.config import (
    SegmentationDataConfig,
    SegmentationModelConfig,
    SegmentationTrainConfig,
)

NAMES = ["ground", "red", "blue"]
COLOURS = np.array([(128, 128, 128), (220, 40, 40), (40, 60, 220)])
ENCODER = {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_representatives": 4}
COUNTS = {"train": 13, "val": 5, "test": 4}


def write_masked_folder(root: Path) -> Path:
    """Write the splits and ``classes.txt``."""
    random = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for part in ("images", "masks"):
            (root / split / part).mkdir(parents=True)
        for i in range(count):
            height, width = (int(side) for side in random.integers(24, 60, 2))
            mask = np.zeros((height, width), dtype=np.uint8)
            for label in (1, 2):
                top, left = random.integers(0, height - 12), random.integers(0, width - 12)
                mask[top : top + 12, left : left + 12] = label
            pixels = COLOURS[mask] + random.integers(-20, 20, (height, width, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(NAMES))
    return root


def tiny_segmentation(root: Path, output: Path) -> SegmentationTrainConfig:
    """Two epochs of three steps with a model of a few thousand parameters."""
    return SegmentationTrainConfig(
        output=str(output),
        model=SegmentationModelConfig(
            args={
                "encoder": "cbt_nano_patch4_32",
                "encoder_args": ENCODER,
                "depth": 1,
                "num_heads": 2,
                "head_dim": 8,
                "mixer_args": {"num_representatives": 4},
            }
        ),
        data=SegmentationDataConfig(
            name="folder", root=str(root), workers=0, crop_size=32, max_class_share=None
        ),
        optim=OptimConfig(
            name="adamw",
            lr=3e-3,
            batch_size=4,
            epochs=2,
            warmup_epochs=0,
            label_smoothing=0.0,
            schedule="poly",
        ),
        engine=EngineConfig(cpu=True, tracker="none"),
    )
