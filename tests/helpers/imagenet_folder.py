"""A folder of the shape of ImageNet-1K: train/ and val/, WordNet numbers as classes, JPEGs of many sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = {"n01440764": (200, 60, 40), "n02084071": (40, 200, 60), "n03445777": (40, 60, 200)}
"""WordNet numbers and the colour that tells a class."""
SIZES = [(500, 375), (375, 500), (224, 224), (120, 90), (640, 300), (333, 500)]
"""Width and height; ImageNet's are as varied."""


def write_imagenet_folder(root: Path, train: int = 12, val: int = 5) -> None:
    """Write ``train`` and ``val`` images of each class; among them, as in ImageNet, a grey one, a CMYK one and a
    PNG that is called JPEG."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number, (name, colour) in enumerate(CLASSES.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                width, height = SIZES[(i + number) % len(SIZES)]
                coarse = np.array(colour) + generator.integers(-40, 40, (height // 20, width // 20, 3))
                small = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
                image = small.resize((width, height), Image.Resampling.BICUBIC)
                if split == "train" and i == 0:
                    image = image.convert("L")
                elif split == "train" and i == 1:
                    image = image.convert("CMYK")
                kind = "PNG" if split == "train" and i == 2 else "JPEG"
                label = f"{name}_{i}" if split == "train" else f"ILSVRC2012_val_{count * number + i + 1:08d}"
                image.save(folder / f"{label}.JPEG", kind)
