"""What a stream is to do: layers and what they gather, sweeps over the tokens, sizes, and the results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cbsa_torch._core.fingerprint import model_fingerprint
from cbsa_torch._core.linear import call_changes
from cbsa_torch._core.precision import compute_dtype
from cbsa_torch.models.segmentation.decoder import DecoderLayer
from cbsa_torch.nn import ResidualBlock, WhiteBoxBlock
from cbsa_torch.streaming.accepted import MARGIN, check_results, parts_of
from cbsa_torch.streaming.mixers import Gathered, Place, gathered

CHUNK = 8192
"""The most tokens in a chunk: more would not be faster."""
TILE_CHUNKS = 4
"""The most chunks that are embedded at once."""
_BLOCKS = (WhiteBoxBlock, ResidualBlock, DecoderLayer)
_COST = {"embed": 2.0, "gather": 1.0, "update": 2.0, "labels": 2.0}
"""Of a token in a sweep, for the time that is left."""


class Embedding(Protocol):
    """The source and what becomes of it: tokens before the first layer."""

    @property
    def kind(self) -> str:
        """What it is called in errors."""

    @property
    def grid_size(self) -> tuple[int, ...]:
        """The tokens after the prefix as results have them, ``(h, w)`` or ``(N,)``."""

    @property
    def place(self) -> Place:
        """The same as mixers see them."""

    @property
    def held(self) -> int:
        """Bytes that are held all the time."""

    def tiles(self, budget: int, most: int) -> list[slice]:
        """The tokens that are embedded at once; raises where the budget is too small."""

    def prefix(self) -> Tensor:
        """Tokens before the others, ``(1, 1, C)``."""

    def tokens(self, place: slice) -> Tensor:
        """Those of a tile, ``(1, T, C)``."""

    def fingerprint(self) -> str:
        """By which the source is known again."""

    def draw(self, array: Path, picture: Path) -> bool:
        """Draw a map of the tokens; False if there is no picture of such."""


class Layer(NamedTuple):
    """A layer and what it has gathered."""

    block: Any
    norm: nn.Module
    gathered: Gathered


class Stage(NamedTuple):
    """Layers that see the same tokens: those of the encoder, and of a decoder."""

    layers: list[Layer]
    length: int
    """Tokens, prefix tokens included."""
    prefix: int
    dim: int
    chunk: int
    """Tokens in a chunk."""

    def chunks(self) -> list[slice]:
        """All tokens, chunk by chunk."""
        return [slice(i, min(i + self.chunk, self.length)) for i in range(0, self.length, self.chunk)]


class Sweep(NamedTuple):
    """Once over all tokens."""

    kind: str
    """``"embed"``, ``"gather"``, ``"update"`` or ``"labels"``."""
    stage: int = 0
    layer: int = 0


class Plan:
    """What there is to do; everything is checked when it is made.

    Args:
        model: what :func:`cbsa_torch.streaming.stream` takes.
        embedding: of its source.
        size: of an image in pixels, for labels.
        results, layer, scratch_dtype: as there.
        budget: bytes.

    Attributes:
        sweeps: in order. stages: of layers. tiles: what is embedded at once. fingerprint: in parts.
    """

    def __init__(
        self,
        model: nn.Module,
        embedding: Embedding,
        *,
        size: tuple[int, int] | None,
        results: Sequence[str] | None,
        layer: int,
        budget: int,
        scratch_dtype: torch.dtype | None,
    ) -> None:
        self.encoder, self.decoder = parts_of(model)
        self.embedding, self.grid_size, self.size = embedding, embedding.grid_size, size
        self.wanted = check_results(results, self.encoder, self.decoder)
        depth = len(self.encoder.blocks)
        if isinstance(layer, bool) or not isinstance(layer, int) or not -depth <= layer < depth:
            raise ValueError(f"layer must be one of {depth}, -{depth} to {depth - 1}, got {layer!r}")
        self.map_layer = layer % depth if "map" in self.wanted else -1
        self.like = self.encoder.cls_token
        self.dtype = self.like.dtype if scratch_dtype is None else scratch_dtype
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(f"scratch_dtype must be a floating-point dtype, got {scratch_dtype!r}")
        self.budget = budget - embedding.held
        needed = self.map_layer + 1 if self.wanted == {"map"} else depth
        self.stages = [self._stage("blocks", list(self.encoder.blocks[:needed]), 1, self.encoder.embed_dim)]
        if "labels" in self.wanted:
            assert self.decoder is not None, "checked with the results"
            classes, dim = self.decoder.num_classes, self.decoder.dim
            self.stages.append(self._stage("decoder.layers", list(self.decoder.layers), classes, dim))
        self.tiles = embedding.tiles(self.budget, TILE_CHUNKS * self.stages[0].chunk)
        self.sweeps = [Sweep("embed")]
        for s, stage in enumerate(self.stages):
            for i, each in enumerate(stage.layers):
                self.sweeps += [Sweep("gather", s, i)] * (each.gathered.gathers - 1) + [Sweep("update", s, i)]
        if "labels" in self.wanted:
            self.sweeps.append(Sweep("labels"))
        self.fingerprint = {
            "model": model_fingerprint(model),
            embedding.kind: embedding.fingerprint(),
            "option": repr((sorted(self.wanted), self.map_layer, self.dtype)),
        }

    def _stage(self, name: str, blocks: list[Any], prefix: int, dim: int) -> Stage:
        length = prefix + math.prod(self.grid_size)
        layers = []
        for i, block in enumerate(blocks):
            if type(block) not in _BLOCKS:
                known = ", ".join(kind.__name__ for kind in _BLOCKS)
                raise ValueError(
                    f"{name}.{i} is {type(block).__name__}, which cannot be streamed; these can: {known}"
                )
            change = call_changes(block)
            if change:
                raise ValueError(f"{name}.{i} cannot be streamed: {change}, which would not act; remove it")
            norm = block.norm if type(block) is DecoderLayer else block.norm1
            part = gathered(f"{name}.{i}.attn", block.attn, length, self.embedding.place, prefix)
            layers.append(Layer(block, norm, part))
        numbers = max(10 * dim + _widest(each.block) + each.gathered.numbers_per_token for each in layers)
        size = int(MARGIN * numbers * compute_dtype(self.like.dtype).itemsize)
        least = max(prefix + 1, 16)
        if self.budget < least * size:
            raise ValueError(
                f"memory must be at least {least * size + self.embedding.held} bytes for {least} tokens, got "
                f"{self.budget + self.embedding.held}"
            )
        return Stage(layers, length, prefix, dim, min(CHUNK, self.budget // size))

    def scratch_files(self, scratch: Path) -> dict[Path, int]:
        """The scratch files and their sizes."""
        tokens = max(stage.length * stage.dim for stage in self.stages) * self.dtype.itemsize
        paths = dict.fromkeys((scratch / "tokens-0.bin", scratch / "tokens-1.bin"), tokens)
        if "labels" in self.wanted:
            assert self.decoder is not None, "checked with the results"
            numbers = math.prod(self.grid_size) * self.decoder.num_classes
            paths[scratch / "masks.bin"] = numbers * compute_dtype(self.like.dtype).itemsize
        return paths

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """The arrays that are results, by name."""
        number = np.dtype("float64" if self.like.dtype == torch.float64 else "float32")
        arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        if "logits" in self.wanted:
            # without a head the model gives the feature
            arrays["logits"] = (1, self.encoder.num_classes or self.encoder.embed_dim), number
        if "map" in self.wanted:
            attn: Any = self.encoder.blocks[self.map_layer].attn
            arrays["map"] = (attn.num_heads, *self.grid_size), number
        if "features" in self.wanted:
            arrays["features"] = (*self.grid_size, self.encoder.embed_dim), number
        if "labels" in self.wanted:
            assert self.decoder is not None, "checked with the results"
            assert self.size is not None, "of an image"
            classes = np.dtype("uint8" if self.decoder.num_classes <= 256 else "uint16")
            arrays["labels"] = self.size, classes
        return arrays

    def cost(self, sweep: Sweep, tokens: int | None = None) -> float:
        """Of so many tokens of a sweep, of all by default; in no unit."""
        if tokens is None:
            whole = sweep.kind in ("embed", "labels")
            tokens = math.prod(self.grid_size) if whole else self.stages[sweep.stage].length
        return tokens * _COST[sweep.kind]

    def name(self, sweep: Sweep) -> str:
        """What is being done, in words."""
        if sweep.kind in ("embed", "labels"):
            return sweep.kind
        part = "layer" if sweep.stage == 0 else "decoder layer"
        return f"{part} {sweep.layer + 1} of {len(self.stages[sweep.stage].layers)}: {sweep.kind}"

    def layer_after(self, finished: int) -> Gathered | None:
        """The layer whose tensors are to be kept after so many sweeps."""
        if finished == len(self.sweeps) or self.sweeps[finished].kind not in ("gather", "update"):
            return None
        sweep = self.sweeps[finished]
        return self.stages[sweep.stage].layers[sweep.layer].gathered


def _widest(block: Any) -> int:
    """Numbers that a layer's projections and feed-forward hold for a token."""
    mixer, mlp = block.attn, getattr(block, "mlp", None)
    inner = 6 * mixer.num_heads * mixer.head_dim * (1 if mixer.shared_qkv else 3)
    return inner + (0 if mlp is None else 2 * int(mlp[0].out_features))
