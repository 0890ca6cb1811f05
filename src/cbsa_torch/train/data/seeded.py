"""Training samples that are augmented the same way wherever and whenever they are read.

timm's and torchvision's transforms draw from the generators of Python, NumPy and torch. Before a sample is
read, the three are seeded from (seed, epoch, index) alone. Its pixels then do not depend on the number of
workers and processes, nor on where an interrupted run went on.
"""

from __future__ import annotations

import hashlib
import random
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from cbsa_torch._core.random import keep_random_states


class SeededSamples(Dataset[Any]):
    """A data set whose random transforms are seeded for every sample.

    The process that asks for samples keeps its own random states. A worker process of a loader draws nothing
    else, hence its states are not kept.

    Args:
        source: a data set of (image, label) with a ``transform``, which is this one's, too.
        seed: of the run.
    """

    def __init__(self, source: Any, seed: int) -> None:
        self.source, self.seed, self.epoch = source, seed, 0

    @property
    def transform(self) -> Any:
        """The transform of the source."""
        return self.source.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.source.transform = transform

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of an epoch; call it before the loader is iterated over."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        with _keep_states_of_this_process():
            return self._read(index)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """The samples of a batch, as torch's loader asks for them: the states are kept once for all."""
        with _keep_states_of_this_process():
            return [self._read(index) for index in indices]

    def _read(self, index: int) -> Any:
        seed_everything(self.seed, self.epoch, index)
        return self.source[index]


def seed_everything(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's generator (of the CPU) with a hash of the numbers, a part for each."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=20).digest()
    random.seed(int.from_bytes(digest[:8], "little"))
    np.random.seed(int.from_bytes(digest[8:12], "little"))
    torch.default_generator.manual_seed(int.from_bytes(digest[12:], "little"))


def _keep_states_of_this_process() -> AbstractContextManager[None]:
    return keep_random_states() if get_worker_info() is None else nullcontext()


def set_epoch(loader: Any, epoch: int) -> None:
    """Choose an epoch's order and augmentation, for a loader that Accelerate prepared (or a plain one).

    Accelerate tells the samplers the epoch, but the data set only if its samplers are not nested, that is in
    one process and from an epoch's first batch. Hence both are told here; call it before
    ``skip_first_batches``, whose loader shares the data set.
    """
    for part in (loader, loader.dataset):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
