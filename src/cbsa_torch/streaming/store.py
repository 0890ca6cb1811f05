"""The files of a stream while its sweeps are done, and what it keeps in memory from one to the next."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from cbsa_torch.streaming.files import ArrayFile, Rows
from cbsa_torch.streaming.plan import Plan, Stage


class Store:
    """Tokens between layers, results, and sums that become logits.

    Args:
        plan: what there is to do.
        folder: of the results. scratch: of the tokens between layers.
        files: closes what stays open when a sweep fails.

    Attributes:
        pooled: what becomes logits.
    """

    def __init__(self, plan: Plan, folder: Path, scratch: Path, files: ExitStack) -> None:
        self.plan, self.folder, self.scratch, self.files = plan, folder, scratch, files
        self.pooled: dict[str, Tensor] = {}

    def tokens_after(self, index: int, stage: int) -> Rows:
        """The tokens after so many layers."""
        return self.rows(f"tokens-{index % 2}.bin", self.plan.stages[stage].dim, self.plan.dtype)

    def rows(self, name: str, numbers: int, dtype: torch.dtype) -> Rows:
        """A scratch file."""
        rows = Rows(self.scratch / name, numbers, dtype)
        self.files.callback(rows.file.close)  # where it is not completed
        return rows

    def array(self, name: str) -> ArrayFile:
        """The file of a result."""
        array = ArrayFile(self.folder / f"{name}.npy", *self.plan.arrays()[name])
        self.files.callback(array.file.close)
        return array

    def read(self, rows: Rows, place: slice) -> Tensor:
        """Tokens ``(1, T, C)`` of a file, as the model computes."""
        return rows.read(place).to(self.plan.like.device, self.plan.like.dtype)

    def hand_on(self, rows: Rows, stage: Stage, tokens: Tensor, first: int, layer: int = 0) -> None:
        """Write the input of a layer, and tell it to the layer."""
        rows.write(first, tokens)
        # What is told is what will be read: rounded, if the file is.
        tokens = tokens.to(self.plan.dtype).to(self.plan.like.dtype)
        following = stage.layers[layer]
        following.gathered.add(following.norm(tokens), slice(first, first + tokens.shape[1]))
