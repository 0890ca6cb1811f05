"""The sweeps over the tokens of a stream.

The source is embedded tile by tile. Then each layer is told all its tokens, chunk by chunk, as often as its
mixer needs (:mod:`cbsa_torch.streaming.mixers`), and updates them; the last of these sweeps feeds the first of
the next layer. So CBSA takes two sweeps per layer: one extracts, one broadcasts, applies the feed-forward and
pools the next layer's initial guesses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cbsa_torch._core.precision import compute_dtype
from cbsa_torch.streaming.accepted import MARGIN
from cbsa_torch.streaming.endings import Encoded, Masks
from cbsa_torch.streaming.files import ArrayFile, State, StreamError
from cbsa_torch.streaming.pixels import rows_of
from cbsa_torch.streaming.plan import Stage, Sweep
from cbsa_torch.streaming.store import Store

TILE = 32
"""The most tokens along the side of a tile of labels."""


class Sweeps:
    """Does the sweeps of a plan.

    Args:
        store: with the plan and its files.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.plan = store, store.plan

    def do(self, sweep: Sweep) -> Iterator[int]:
        """Do one sweep; yields the number of tokens after each chunk."""
        steps: Iterator[int] = getattr(self, f"_{sweep.kind}")(sweep)
        return steps

    def to_save(self, finished: int) -> dict[str, Tensor]:
        """What the sweeps after so many need beside the tokens."""
        part = self.plan.layer_after(finished)
        kept = {} if part is None else {f"layer.{name}": tensor for name, tensor in part.saved.items()}
        return {**kept, **{f"pool.{name}": tensor for name, tensor in self.store.pooled.items()}}

    def restore(self, state: State) -> None:
        """Go on from that."""
        part = self.plan.layer_after(state.finished)
        for key, tensor in state.tensors.items():
            kind, _, name = key.partition(".")
            if kind == "pool":
                self.store.pooled[name] = tensor.to(self.plan.like.device)
            elif part is not None:
                part.saved[name] = tensor.to(self.plan.like.device)

    def _embed(self, sweep: Sweep) -> Iterator[int]:
        stage, rows, embedding = self.plan.stages[0], self.store.tokens_after(0, 0), self.plan.embedding
        self.store.hand_on(rows, stage, embedding.prefix(), 0)
        for tile in self.plan.tiles:
            tokens = embedding.tokens(tile)
            for first in range(0, tokens.shape[1], stage.chunk):
                part = tokens[:, first : first + stage.chunk]
                self.store.hand_on(rows, stage, part, stage.prefix + tile.start + first)
            yield tokens.shape[1]
        rows.complete()
        if embedding.fingerprint() != self.plan.fingerprint[embedding.kind]:
            raise StreamError(f"the {embedding.kind} changed while it was read; begin anew once it is complete")
        stage.layers[0].gathered.finish()

    def _gather(self, sweep: Sweep) -> Iterator[int]:
        stage = self.plan.stages[sweep.stage]
        layer = stage.layers[sweep.layer]
        rows = self.store.tokens_after(self._index(sweep), sweep.stage)
        for place in stage.chunks():
            layer.gathered.add(layer.norm(self.store.read(rows, place)), place)
            yield place.stop - place.start
        rows.complete()
        layer.gathered.finish()

    def _index(self, sweep: Sweep) -> int:
        """Layers before, which say in which of the two files the tokens are."""
        return sweep.layer + (len(self.plan.stages[0].layers) if sweep.stage else 0)

    def _update(self, sweep: Sweep) -> Iterator[int]:
        stage = self.plan.stages[sweep.stage]
        layer, is_last = stage.layers[sweep.layer], sweep.layer + 1 == len(stage.layers)
        rows = self.store.tokens_after(self._index(sweep), sweep.stage)
        drawn = self.store.array("map") if sweep.stage == 0 and sweep.layer == self.plan.map_layer else None
        ending = Encoded(self.store) if is_last and sweep.stage == 0 else Masks(self.store) if is_last else None
        target = None if is_last else self.store.tokens_after(self._index(sweep) + 1, sweep.stage)
        chunks = stage.chunks()
        if isinstance(ending, Encoded) and ending.needs_prefix_only and drawn is None:
            chunks = chunks[:1]
        for place in chunks:
            x = self.store.read(rows, place)
            normed = layer.norm(x)
            if drawn is not None:
                self._draw(drawn, layer.gathered.map_row(normed, place), place, stage)
            if not (isinstance(ending, Encoded) and ending.needs_nothing):
                update = layer.block.attn.proj_drop(layer.gathered.update(normed, place))
                x = layer.block.apply_update(x, normed, update)
            if target is not None:
                self.store.hand_on(target, stage, x, place.start, sweep.layer + 1)
            elif ending is not None:
                ending.add(x, place)
            yield place.stop - place.start
        for file in (rows, target, drawn, ending):
            if file is not None:
                file.complete()
        if target is not None:
            stage.layers[sweep.layer + 1].gathered.finish()
        layer.gathered.saved.clear()

    def _draw(self, drawn: ArrayFile, row: Tensor, place: slice, stage: Stage) -> None:
        skip = max(stage.prefix - place.start, 0)
        for head, values in enumerate(row[:, skip:].cpu().numpy()):
            first = head * math.prod(self.plan.grid_size) + place.start + skip - stage.prefix
            drawn.write(first, values)

    def _labels(self, sweep: Sweep) -> Iterator[int]:
        """Upsample the masks bilinearly, tile by tile with a token around, and take the largest."""
        decoder, size = self.plan.decoder, self.plan.size
        assert decoder is not None, "checked with the results"
        assert size is not None, "of an image"
        stem: Any = self.plan.encoder.stem
        file, patch, count = self.store.array("labels"), stem.patch_size, decoder.num_classes
        (rows, columns), (height, width) = self.plan.grid_size, size
        masks = self.store.rows("masks.bin", count, compute_dtype(self.plan.like.dtype))
        token = int(MARGIN * 2 * count * patch**2 * masks.dtype.itemsize)
        side = max(1, min(TILE, math.isqrt(self.plan.budget // (2 * token)) - 2))
        for band in rows_of(rows, side):
            top, bottom = max(band.start - 1, 0), min(band.stop + 1, rows)
            labels = np.empty(((band.stop - band.start) * patch, columns * patch), file.dtype)
            for across in rows_of(columns, side):
                left, right = max(across.start - 1, 0), min(across.stop + 1, columns)
                starts = range(top * columns, bottom * columns, columns)
                part = torch.cat([masks.read(slice(i + left, i + right)) for i in starts])  # (rows, columns, K)
                part = part.to(self.plan.like.device)
                sides = [length * patch for length in part.shape[:2]]
                pixels = F.interpolate(part.permute(2, 0, 1)[None], size=sides, mode="bilinear")[0]
                first = (band.start - top) * patch, (across.start - left) * patch
                cut = pixels[:, first[0] :, first[1] :][
                    :, : labels.shape[0], : (across.stop - across.start) * patch
                ]
                labels[:, across.start * patch : across.stop * patch] = cut.argmax(0).cpu().numpy()
            kept = labels[: height - band.start * patch, :width]
            file.write(band.start * patch * width, kept)
            yield (band.stop - band.start) * columns
        masks.complete()
        file.complete()
