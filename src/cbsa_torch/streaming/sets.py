"""Sets of features that do not fit into memory: read by rows, and embedded chunk by chunk."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbsa_torch._core.linear import call_changes
from cbsa_torch._core.precision import compute_dtype
from cbsa_torch.models import TokenSetTransformer
from cbsa_torch.nn import Coordinates
from cbsa_torch.streaming.accepted import MARGIN
from cbsa_torch.streaming.arrays import SlicedArray, check_array, file_facts, read_part
from cbsa_torch.streaming.picture import draw_places

SAMPLES = 16
"""Rows by which features are known again."""
PER_COORDINATE = 96
"""Bytes that finding cells takes for every coordinate, those of the coordinates included."""


class FeatureEmbedding:
    """What a :class:`cbsa_torch.models.TokenSetTransformer` embeds, by rows of features.

    Args:
        model: whose embedding and positions.
        features: ``(N, in_dim)`` or ``(1, N, in_dim)``.
        coords: ``(N, k)`` or ``(1, N, k)``, or None. They are read into memory, few numbers beside the
            channels: cells are those of all tokens.
        budget: bytes for that.

    Attributes:
        grid_size: ``(N,)``, the shape of results. place: the coordinates, for mixers.

    Raises:
        ValueError: shapes that do not fit, coordinates that are missing or not finite, a budget that is too
            small, an embedding with hooks. TypeError: no arrays of real numbers.
    """

    kind = "set"

    def __init__(
        self, model: TokenSetTransformer, features: SlicedArray, coords: SlicedArray | None, budget: int
    ) -> None:
        self.model, self.features, self.coords = model, features, coords
        if call_changes(model.embed):
            raise ValueError(f"embed cannot be streamed: {call_changes(model.embed)}; remove it")
        check_array("source", features)
        shape = tuple(int(side) for side in features.shape)
        self.batched = len(shape) == 3 and shape[0] == 1
        if shape[self.batched :][1:] != (model.in_dim,) or 0 in shape:
            raise ValueError(
                f"source must have shape (N, in_dim) with the model's in_dim {model.in_dim} and at least one "
                f"row, got {shape}"
            )
        self.length = shape[self.batched]
        self.grid_size = (self.length,)
        self.place: Coordinates | None = None
        self.placed: Tensor | None = None
        self.held = 0
        if coords is None:
            if model.needs_coords:
                raise ValueError(f"coords must be given to this model (positions={model.positions!r})")
            return
        check_array("coords", coords)
        sides, own = tuple(int(side) for side in coords.shape), (self.length, model.coord_dim)
        if sides not in (own, (1, *own)):
            raise ValueError(f"coords must have shape {own}, a row of coord_dim for every feature; got {sides}")
        least = PER_COORDINATE * self.length * model.coord_dim
        if budget < least:
            raise ValueError(
                f"memory must be at least {least} bytes for the coordinates of {self.length} tokens and what "
                f"finds their cells, got {budget}"
            )
        numbers = torch.from_numpy(self._read_coords())[None].to(model.cls_token.device)
        self.place = Coordinates(numbers)
        if not numbers.isfinite().all():
            raise ValueError("coords must be finite for every token, got NaN or infinity")
        self.placed = model.placed(numbers)
        self.held = self.length * (12 * model.coord_dim + 16)  # with the cells of the tokens

    def _read_coords(self) -> np.ndarray[Any, Any]:
        assert self.coords is not None, "given"
        index = tuple(slice(0, int(side)) for side in self.coords.shape)
        numbers = read_part("coords", self.coords, index).reshape(self.length, -1)
        if numbers.dtype.kind == "u" and numbers.max() > np.iinfo(np.int64).max:
            raise ValueError(f"coords must be below 2^63, got {numbers.max()}")
        return numbers.astype(np.float64 if numbers.dtype.kind == "f" else np.int64)

    def _rows(self, place: slice) -> np.ndarray[Any, Any]:
        index = (place, slice(0, self.model.in_dim))
        part = read_part("source", self.features, (slice(0, 1), *index) if self.batched else index)
        return part.reshape(-1, self.model.in_dim)

    def tiles(self, budget: int, most: int) -> list[slice]:
        """The tokens that are embedded at once, at most so many."""
        numbers = 2 * self.model.in_dim + 8 * self.model.embed_dim
        row = int(MARGIN * numbers * compute_dtype(self.model.cls_token.dtype).itemsize)
        if budget < row:
            raise ValueError(f"memory must leave {row} bytes for a token and its features, got {budget}")
        step = min(most, budget // row)
        return [slice(i, min(i + step, self.length)) for i in range(0, self.length, step)]

    def prefix(self) -> Tensor:
        """The class token, ``(1, 1, C)``."""
        return self.model.cls_token

    def tokens(self, place: slice) -> Tensor:
        """Those of the features in ``place``, ``(1, T, C)``, positions added."""
        like = self.model.cls_token
        features = torch.from_numpy(self._rows(place))[None].to(like.device, like.dtype)
        return self.model.embed_tokens(features, None if self.placed is None else self.placed[:, place])

    def fingerprint(self) -> str:
        """By which the set is known again: shapes, dtypes, some of its rows, coordinates, times of files."""
        digest = hashlib.sha256(repr((tuple(self.features.shape), str(self.features.dtype))).encode())
        digest.update(file_facts(self.features))
        for i in range(SAMPLES):
            row = i * (self.length - 1) // (SAMPLES - 1)
            digest.update(np.ascontiguousarray(self._rows(slice(row, row + 1))).tobytes())
        if self.coords is not None:
            digest.update(file_facts(self.coords))
            digest.update(hashlib.sha256(np.ascontiguousarray(self._read_coords()).data).digest())
        return digest.hexdigest()

    def draw(self, array: Path, picture: Path) -> bool:
        """Draw a map of two-dimensional coordinates (x, y); False for others, of which there is no picture."""
        if self.place is None or self.model.coord_dim != 2:
            return False
        draw_places(array, self.place.coords[0].cpu().numpy(), picture)
        return True
