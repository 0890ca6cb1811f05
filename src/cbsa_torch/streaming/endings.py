"""What becomes of the last tokens: logits and features of an encoder, masks of a decoder."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cbsa_torch._core.precision import compute_dtype
from cbsa_torch.streaming.store import Store


class Encoded:
    """What becomes of the encoder's last tokens: logits, dense features, a decoder's input."""

    def __init__(self, store: Store) -> None:
        plan = store.plan
        self.store, self.plan, self.model = store, plan, plan.encoder
        self.pool = self.model.global_pool if "logits" in plan.wanted else None
        self.features = store.array("features") if "features" in plan.wanted else None
        self.stage = plan.stages[1] if len(plan.stages) > 1 else None
        self.needs_nothing = self.pool is None and self.features is None and self.stage is None
        self.needs_prefix_only = self.pool == "token" and self.features is None and self.stage is None
        self.rows = None
        self.prefix = plan.stages[0].prefix
        store.pooled.clear()
        if self.stage is not None:
            assert plan.decoder is not None, "it has a stage"
            self.rows = store.tokens_after(len(plan.stages[0].layers), 1)
            store.hand_on(self.rows, self.stage, plan.decoder.class_embed, 0)

    def add(self, x: Tensor, place: slice) -> None:
        """Tokens ``(1, T, C)`` after the last layer."""
        if self.needs_nothing:
            return
        x = self.model.norm(x)
        skip = max(self.prefix - place.start, 0)
        grid, first = x[:, skip:], place.start + skip - self.prefix
        if self.pool is not None:
            self._pool(x[:, 0] if place.start == 0 else None, grid)
        if self.features is not None:
            numbers = grid[0].to("cpu", compute_dtype(grid.dtype)).numpy()
            self.features.write(first * numbers.shape[1], numbers)
        if self.stage is not None and self.rows is not None and self.plan.decoder is not None:
            patches = self.plan.decoder.input_proj(grid)
            self.store.hand_on(self.rows, self.stage, patches, self.stage.prefix + first)

    def _pool(self, token: Tensor | None, grid: Tensor) -> None:
        pooled = self.store.pooled
        if token is not None:
            pooled["token"] = token.clone()
        if self.pool in ("avg", "avgmax"):
            total = grid.sum(1, dtype=torch.float32 if grid.device.type == "mps" else torch.float64)
            pooled["sum"] = pooled["sum"] + total if "sum" in pooled else total
        if self.pool in ("max", "avgmax") and grid.shape[1]:
            largest = grid.amax(1)
            pooled["max"] = largest.maximum(pooled["max"]) if "max" in pooled else largest

    def complete(self) -> None:
        """Complete the files."""
        if self.features is not None:
            self.features.complete()
        if self.rows is not None and self.stage is not None:
            self.rows.complete()
            self.stage.layers[0].gathered.finish()
        if self.pool is not None:
            pooled, dtype = self.store.pooled, self.plan.like.dtype
            if self.pool == "token":
                feature = pooled["token"]
            else:
                parts = []
                if "sum" in pooled:
                    parts.append((pooled["sum"] / math.prod(self.plan.grid_size)).to(dtype))
                if "max" in pooled:
                    parts.append(pooled["max"])
                feature = sum(parts[1:], parts[0]) / len(parts)
            logits = self.model.head(self.model.head_drop(feature))
            file = self.store.array("logits")
            file.write(0, logits.to("cpu", compute_dtype(dtype)).numpy())
            file.complete()


class Masks:
    """What becomes of the decoder's last tokens: a mask of each class."""

    def __init__(self, store: Store) -> None:
        plan = store.plan
        assert plan.decoder is not None, "it has a stage"
        self.decoder, self.prefix = plan.decoder, plan.stages[1].prefix
        self.rows = store.rows("masks.bin", self.prefix, compute_dtype(plan.like.dtype))
        self.classes: Tensor | None = None

    def add(self, x: Tensor, place: slice) -> None:
        """Tokens ``(1, T, C)`` after the last layer, the classes first."""
        x = self.decoder.norm(x)
        skip = max(self.prefix - place.start, 0)
        if place.start == 0:
            self.classes = x[:, : self.prefix].clone()
        assert self.classes is not None, "they come first"
        masks = self.decoder.masks(x[:, skip:], self.classes)
        self.rows.write(place.start + skip - self.prefix, masks)

    def complete(self) -> None:
        """Complete the file."""
        self.rows.complete()
