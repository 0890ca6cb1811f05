"""A white-box Transformer over an image that does not fit into memory: sweeps over tokens in a file.

The image is embedded by tiles of rows. Then each layer is told all its tokens, chunk by chunk, as often as its
mixer needs (:mod:`cbsa_torch.streaming.mixers`), and updates them; the last of these sweeps feeds the first of
the next layer. So CBSA takes two sweeps per layer: one extracts, one broadcasts, applies the feed-forward and
pools the next layer's first guesses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch._core.files import write_atomically
from cbsa_torch._core.linear import call_changes
from cbsa_torch._core.precision import compute_dtype
from cbsa_torch.streaming.accepted import (
    Result,
    check_results,
    model_fingerprint,
    parse_bytes,
    parts_of,
)
from cbsa_torch.streaming.files import STATE, ArrayFile, Rows, State, StreamError, check_space, differences
from cbsa_torch.streaming.mixers import Gathered, gathered
from cbsa_torch.streaming.picture import draw_map
from cbsa_torch.streaming.pixels import Channels, Embedding, Pixels, SlicedArray, padded_size, rows_of

Progress = Callable[[float, float, str], None]
"""Called after each chunk with the work done, all work, and what is being done."""

CHUNK = 8192
"""The most tokens in a chunk: more would not be faster."""
TILE_CHUNKS = 4
"""The most chunks in a tile of the stem."""
MARGIN = 1.5
"""Of memory: what allocators and kernels take beside the numbers that are counted."""
TILE = 32
"""The most tokens along the side of a tile of labels."""
DONE = "result.json"
_COST = {"embed": 2.0, "gather": 1.0, "update": 2.0, "labels": 2.0}
"""Of a token in a sweep, for the time that is left."""


class StreamResult(NamedTuple):
    """What a stream made."""

    folder: Path
    """Where the files are."""
    grid_size: tuple[int, int]
    """Of the tokens."""
    logits: Tensor | None
    """``(1, num_classes)``, if they were asked for."""
    files: dict[str, Path]
    """By result: ``logits.npy``, ``map.npy`` ``(H, h, w)``, ``features.npy`` ``(h, w, C)``, ``labels.npy``
    ``(height, width)``; and ``map.png`` as ``"picture"``."""
    scratch_bytes: int
    """The most that the scratch files held."""


class _Layer(NamedTuple):
    block: Any
    norm: nn.Module
    gathered: Gathered


class _Stage(NamedTuple):
    """Layers that see the same tokens: those of the encoder, and of a decoder."""

    layers: list[_Layer]
    length: int
    """Tokens, prefix tokens included."""
    prefix: int
    dim: int
    chunk: int
    """Tokens in a chunk."""


class _Sweep(NamedTuple):
    kind: str
    stage: int = 0
    layer: int = 0


@torch.inference_mode()
def stream(
    model: nn.Module,
    source: SlicedArray,
    folder: str | Path,
    *,
    results: Sequence[Result] | None = None,
    layer: int = -1,
    channels: Channels = "last",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    memory: int | str = "1GiB",
    scratch: str | Path | None = None,
    scratch_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> StreamResult:
    """Apply a trained model to an image that does not fit into memory: exactly, as if it did.

    Killed at any moment, the same call goes on from the last finished sweep, and once it is done returns what
    it made. Repeated and continued runs give the same bits; with another ``memory`` sums are taken in another
    order, so that results agree to rounding.

    Args:
        model: a :class:`cbsa_torch.models.WhiteBoxTransformer`, or a :class:`cbsa_torch.models.Segmenter` of
            one, in evaluation mode, on any device. Layers of CBSA (pooled or learned representatives, free or
            certified steps), AgentAttention, LinearCBSA and TSSA.
        source: ``(height, width, channels)``, or ``(height, width)`` for one channel: what has a shape and a
            dtype and takes slices, such as :func:`open_array` returns. It is read once, in order.
        folder: for the results.
        results: of ``"logits"``; ``"map"``, how much the class token attends to each token in a layer of the
            encoder (:func:`cbsa_torch.interpret.cls_attention_maps`), with a picture; ``"features"``, the
            normalised tokens of the encoder; ``"labels"``, the class of each pixel. Default: the labels of a
            segmenter, else the logits.
        layer: of the map; negative numbers count from the last.
        channels: whether they are the ``"last"`` axis of ``source`` or the ``"first"``.
        mean, std: of the channels, subtracted and divided by (integers are divided by the largest of their
            dtype before). Default: 0 and 1.
        memory: bytes for what is held of image and tokens at once, or a text such as ``"2GiB"``. The model and
            the libraries come on top.
        scratch: a folder for the tokens between layers, which take about twice their size; removed when all is
            done. Default: ``folder/scratch``.
        scratch_dtype: of these tokens. Default: the model's; ``torch.bfloat16`` takes half as much and rounds.
        progress: see :data:`Progress`.

    Raises:
        ValueError, TypeError: a model, an image or options that cannot be streamed; nothing is read then.
        StreamError: a disk without room, files of another stream, an image or a model that changed.
    """
    run = _Run(model, source, Path(folder), results, layer, channels, mean, std, memory, scratch_dtype)
    return run.run(None if scratch is None else Path(scratch), progress)


class _Run:
    """One call of :func:`stream`. All checks are in the constructor."""

    def __init__(
        self,
        model: nn.Module,
        source: SlicedArray,
        folder: Path,
        results: Sequence[Result] | None,
        layer: int,
        channels: Channels,
        mean: Sequence[float],
        std: Sequence[float],
        memory: int | str,
        scratch_dtype: torch.dtype | None,
    ) -> None:
        self.model, self.folder = model, folder
        self.encoder, self.decoder = parts_of(model)
        given = ("logits" if self.decoder is None else "labels",) if results is None else tuple(results)
        self.wanted = check_results(given, self.encoder, self.decoder)
        depth = len(self.encoder.blocks)
        if isinstance(layer, bool) or not isinstance(layer, int) or not -depth <= layer < depth:
            raise ValueError(f"layer must be one of {depth}, -{depth} to {depth - 1}, got {layer!r}")
        self.map_layer = layer % depth if "map" in self.wanted else -1
        self.like = self.encoder.cls_token
        self.dtype = self.like.dtype if scratch_dtype is None else scratch_dtype
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise TypeError(f"scratch_dtype must be a floating-point dtype, got {scratch_dtype!r}")
        self.pixels = Pixels(source, channels, self.encoder.in_chans, mean, std)
        size = self.pixels.size
        if self.decoder is not None:
            size = padded_size(size, self.encoder.stem.patch_size)
        self.embedding = Embedding(self.encoder, self.pixels, size)
        self.grid_size = self.embedding.grid_size
        self.budget = parse_bytes(memory)
        needed = self.map_layer + 1 if self.wanted == {"map"} else depth
        self.stages = [self._stage("blocks", list(self.encoder.blocks[:needed]), 1, self.encoder.embed_dim)]
        if "labels" in self.wanted:
            assert self.decoder is not None, "checked with the results"
            classes, dim = self.decoder.num_classes, self.decoder.dim
            self.stages.append(self._stage("decoder.layers", list(self.decoder.layers), classes, dim))
        self.rows = self._tile_rows()
        self.sweeps = [_Sweep("embed")]
        for s, stage in enumerate(self.stages):
            for i, each in enumerate(stage.layers):
                self.sweeps += [_Sweep("gather", s, i)] * (each.gathered.gathers - 1) + [_Sweep("update", s, i)]
        if "labels" in self.wanted:
            self.sweeps.append(_Sweep("labels"))
        self.pooled: dict[str, Tensor] = {}
        self.fingerprint = {
            "model": model_fingerprint(model),
            "image": self.pixels.fingerprint(),
            "option": repr((sorted(self.wanted), self.map_layer, channels, *mean, "/", *std, self.dtype)),
        }

    # ---- what there is to do

    def _stage(self, name: str, blocks: list[Any], prefix: int, dim: int) -> _Stage:
        length = prefix + math.prod(self.grid_size)
        layers = []
        for i, block in enumerate(blocks):
            change = call_changes(block)
            if change:
                raise ValueError(f"{name}.{i} cannot be streamed: {change}, which would not act; remove it")
            norm = block.norm if hasattr(block, "norm") else block.norm1
            part = gathered(f"{name}.{i}.attn", block.attn, length, self.grid_size, prefix)
            layers.append(_Layer(block, norm, part))
        numbers = max(10 * dim + _widest(each.block) + each.gathered.numbers_per_token for each in layers)
        size = int(MARGIN * numbers * compute_dtype(self.like.dtype).itemsize)
        least = max(prefix + 1, 16)
        if self.budget < least * size:
            raise ValueError(
                f"memory must be at least {least * size} bytes for {least} tokens, got {self.budget}"
            )
        return _Stage(layers, length, prefix, dim, min(CHUNK, self.budget // size))

    def _tile_rows(self) -> int:
        """Rows of tokens that are embedded at once, several chunks if memory allows: the halo costs, too."""
        width, chunk = self.grid_size[1], self.stages[0].chunk
        numbers = self.embedding.numbers_per_token * compute_dtype(self.like.dtype).itemsize
        row = int(MARGIN * width * numbers)
        halo = self.embedding.above + self.embedding.below
        least = row * (1 + halo)
        if self.budget < least:
            raise ValueError(
                f"memory must be at least {least} bytes for a row of {width} tokens, got {self.budget}"
            )
        return max(1, min(self.budget // row - halo, TILE_CHUNKS * chunk // width, self.grid_size[0]))

    def _chunks(self, stage: _Stage) -> list[slice]:
        return [slice(i, min(i + stage.chunk, stage.length)) for i in range(0, stage.length, stage.chunk)]

    def _paths(self, scratch: Path) -> dict[Path, int]:
        """The scratch files and their sizes."""
        tokens = max(stage.length * stage.dim for stage in self.stages) * self.dtype.itemsize
        paths = dict.fromkeys((scratch / "tokens-0.bin", scratch / "tokens-1.bin"), tokens)
        if "labels" in self.wanted:
            assert self.decoder is not None, "checked with the results"
            numbers = math.prod(self.grid_size) * self.decoder.num_classes
            paths[scratch / "masks.bin"] = numbers * compute_dtype(self.like.dtype).itemsize
        return paths

    def _arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """The arrays that are results, by name."""
        number = np.dtype("float64" if self.like.dtype == torch.float64 else "float32")
        height, width = self.pixels.size
        arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        if "logits" in self.wanted:
            arrays["logits"] = (1, self.encoder.num_classes), number
        if "map" in self.wanted:
            attn: Any = self.encoder.blocks[self.map_layer].attn
            arrays["map"] = (attn.num_heads, *self.grid_size), number
        if "features" in self.wanted:
            arrays["features"] = (*self.grid_size, self.encoder.embed_dim), number
        if "labels" in self.wanted:
            assert self.decoder is not None, "checked with the results"
            arrays["labels"] = (
                (height, width),
                np.dtype("uint8" if self.decoder.num_classes <= 256 else "uint16"),
            )
        return arrays

    # ---- doing it

    def run(self, scratch: Path | None, progress: Progress | None) -> StreamResult:
        """All sweeps that are not finished."""
        self.scratch = self.folder / "scratch" if scratch is None else scratch
        paths, arrays = self._paths(self.scratch), self._arrays()
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self._finished()
        if done is not None:
            self._clean(paths)
            return done
        with ExitStack() as self.files:
            return self._run(paths, arrays, progress)

    def _run(
        self,
        paths: dict[Path, int],
        arrays: dict[str, tuple[tuple[int, ...], np.dtype[Any]]],
        progress: Progress | None,
    ) -> StreamResult:
        state = State(self.scratch, self.fingerprint)
        self.files.callback(state.close)
        outputs = [self.folder / f"{name}.npy" for name in arrays]
        taken = [path for path in outputs if path.exists()]
        if taken and state.finished == 0:
            raise StreamError(f"{taken[0]} is there already; give another folder for the results")
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays.values())
        parts = [path.with_name(f"{path.name}.part") for path in outputs]
        check_space([(self.scratch, sum(paths.values()), paths), (self.folder, size, [*outputs, *parts])])
        self._restore(state)
        total = sum(self._work(sweep) for sweep in self.sweeps)
        self.work = sum(self._work(sweep) for sweep in self.sweeps[: state.finished])
        for i, sweep in enumerate(self.sweeps[state.finished :], state.finished):
            name = self._name(sweep)
            for tokens in getattr(self, f"_{sweep.kind}")(sweep):
                self.work += tokens * _COST[sweep.kind]
                if progress is not None:
                    progress(min(self.work, total), total, name)
            state.save(i + 1, self._to_save(i + 1))
        if "map" in self.wanted:
            draw_map(self.folder / "map.npy", self.folder / "map.png")
        record = {
            "fingerprint": self.fingerprint,
            "grid_size": self.grid_size,
            "scratch_bytes": sum(path.stat().st_size for path in paths if path.exists()),
        }
        write_atomically(self.folder / DONE, json.dumps(record, indent=2).encode())
        state.remove(paths)
        result = self._finished()
        assert result is not None, "just written"
        return result

    def _clean(self, paths: dict[Path, int]) -> None:
        """Remove what a process left that was killed at its very end."""
        with suppress(StreamError):  # another stream's by now
            if (self.scratch / STATE).is_file():
                State(self.scratch, self.fingerprint).remove(paths)

    def _finished(self) -> StreamResult | None:
        """What was made before, if all of it was."""
        path = self.folder / DONE
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text())
            theirs = record["fingerprint"]
        except (ValueError, KeyError, TypeError):
            raise StreamError(f"{path} is not of a stream; give another folder for the results") from None
        if theirs != self.fingerprint:
            differ = " and ".join(differences(theirs, self.fingerprint))
            raise StreamError(f"{self.folder} holds results of another {differ}; give another folder")
        files = {name: self.folder / f"{name}.npy" for name in self._arrays()}
        logits = torch.from_numpy(np.load(files["logits"])) if "logits" in files else None
        if "map" in files:
            files["picture"] = self.folder / "map.png"
        return StreamResult(self.folder, self.grid_size, logits, files, record["scratch_bytes"])

    def _work(self, sweep: _Sweep) -> float:
        length = (
            math.prod(self.grid_size) if sweep.kind in ("embed", "labels") else self.stages[sweep.stage].length
        )
        return length * _COST[sweep.kind]

    def _name(self, sweep: _Sweep) -> str:
        if sweep.kind in ("embed", "labels"):
            return sweep.kind
        part = "layer" if sweep.stage == 0 else "decoder layer"
        return f"{part} {sweep.layer + 1} of {len(self.stages[sweep.stage].layers)}: {sweep.kind}"

    def _layer_of(self, finished: int) -> Gathered | None:
        """The layer whose tensors are to be kept after so many sweeps."""
        if finished == len(self.sweeps) or self.sweeps[finished].kind not in ("gather", "update"):
            return None
        sweep = self.sweeps[finished]
        return self.stages[sweep.stage].layers[sweep.layer].gathered

    def _to_save(self, finished: int) -> dict[str, Tensor]:
        part = self._layer_of(finished)
        kept = {} if part is None else {f"layer.{name}": tensor for name, tensor in part.saved.items()}
        return {**kept, **{f"pool.{name}": tensor for name, tensor in self.pooled.items()}}

    def _restore(self, state: State) -> None:
        part = self._layer_of(state.finished)
        for key, tensor in state.tensors.items():
            kind, _, name = key.partition(".")
            if kind == "pool":
                self.pooled[name] = tensor.to(self.like.device)
            elif part is not None:
                part.saved[name] = tensor.to(self.like.device)

    def _open(self, index: int, stage: int) -> Rows:
        """The tokens after so many layers."""
        return self._rows(f"tokens-{index % 2}.bin", self.stages[stage].dim, self.dtype)

    def _rows(self, name: str, numbers: int, dtype: torch.dtype) -> Rows:
        rows = Rows(self.scratch / name, numbers, dtype)
        self.files.callback(rows.file.close)  # where it is not completed
        return rows

    def _read(self, rows: Rows, place: slice) -> Tensor:
        return rows.read(place).to(self.like.device, self.like.dtype)

    def _embed(self, sweep: _Sweep) -> Iterator[int]:
        stage, rows = self.stages[0], self._open(0, 0)
        width = self.grid_size[1]
        self._hand_on(rows, stage, self.embedding.prefix(), 0)
        for tile in rows_of(self.grid_size[0], self.rows):
            tokens = self.embedding.rows(tile)
            for first in range(0, tokens.shape[1], stage.chunk):
                part = tokens[:, first : first + stage.chunk]
                self._hand_on(rows, stage, part, stage.prefix + tile.start * width + first)
            yield tokens.shape[1]
        rows.complete()
        if self.pixels.fingerprint() != self.fingerprint["image"]:
            raise StreamError("the image changed while it was read; begin anew once it is complete")
        stage.layers[0].gathered.finish()

    def _hand_on(self, rows: Rows, stage: _Stage, tokens: Tensor, first: int, layer: int = 0) -> None:
        """Write the input of a layer, and tell it to the layer."""
        rows.write(first, tokens)
        # What is told is what will be read: rounded, if the file is.
        tokens = tokens.to(self.dtype).to(self.like.dtype)
        following = stage.layers[layer]
        following.gathered.add(following.norm(tokens), slice(first, first + tokens.shape[1]))

    def _gather(self, sweep: _Sweep) -> Iterator[int]:
        stage = self.stages[sweep.stage]
        layer = stage.layers[sweep.layer]
        rows = self._open(self._index(sweep), sweep.stage)
        for place in self._chunks(stage):
            layer.gathered.add(layer.norm(self._read(rows, place)), place)
            yield place.stop - place.start
        rows.complete()
        layer.gathered.finish()

    def _index(self, sweep: _Sweep) -> int:
        """Layers before, which say in which of the two files the tokens are."""
        return sweep.layer + (len(self.stages[0].layers) if sweep.stage else 0)

    def _update(self, sweep: _Sweep) -> Iterator[int]:
        stage = self.stages[sweep.stage]
        layer, is_last = stage.layers[sweep.layer], sweep.layer + 1 == len(stage.layers)
        rows = self._open(self._index(sweep), sweep.stage)
        drawn = self._array("map") if sweep.stage == 0 and sweep.layer == self.map_layer else None
        ending = _Encoded(self) if is_last and sweep.stage == 0 else _Masks(self) if is_last else None
        target = None if is_last else self._open(self._index(sweep) + 1, sweep.stage)
        chunks = self._chunks(stage)
        if isinstance(ending, _Encoded) and ending.needs_prefix_only and drawn is None:
            chunks = chunks[:1]
        for place in chunks:
            x = self._read(rows, place)
            normed = layer.norm(x)
            if drawn is not None:
                self._draw(drawn, layer.gathered.map_row(normed, place), place, stage)
            if not (isinstance(ending, _Encoded) and ending.needs_nothing):
                x = layer.block.apply_update(x, normed, layer.gathered.update(normed, place))
            if target is not None:
                self._hand_on(target, stage, x, place.start, sweep.layer + 1)
            elif ending is not None:
                ending.add(x, place)
            yield place.stop - place.start
        for file in (rows, target, drawn, ending):
            if file is not None:
                file.complete()
        if target is not None:
            stage.layers[sweep.layer + 1].gathered.finish()
        layer.gathered.saved.clear()

    def _array(self, name: str) -> ArrayFile:
        array = ArrayFile(self.folder / f"{name}.npy", *self._arrays()[name])
        self.files.callback(array.file.close)
        return array

    def _draw(self, drawn: ArrayFile, row: Tensor, place: slice, stage: _Stage) -> None:
        skip = max(stage.prefix - place.start, 0)
        for head, values in enumerate(row[:, skip:].cpu().numpy()):
            first = head * math.prod(self.grid_size) + place.start + skip - stage.prefix
            drawn.write(first, values)

    def _labels(self, sweep: _Sweep) -> Iterator[int]:
        """Upsample the masks bilinearly, tile by tile with a token around, and take the largest."""
        assert self.decoder is not None, "checked with the results"
        file, patch, count = self._array("labels"), self.encoder.stem.patch_size, self.decoder.num_classes
        (rows, columns), (height, width) = self.grid_size, self.pixels.size
        masks = self._rows("masks.bin", count, compute_dtype(self.like.dtype))
        token = int(MARGIN * 2 * count * patch**2 * masks.dtype.itemsize)
        side = max(1, min(TILE, math.isqrt(self.budget // (2 * token)) - 2))
        for band in rows_of(rows, side):
            top, bottom = max(band.start - 1, 0), min(band.stop + 1, rows)
            labels = np.empty(((band.stop - band.start) * patch, columns * patch), file.dtype)
            for across in rows_of(columns, side):
                left, right = max(across.start - 1, 0), min(across.stop + 1, columns)
                starts = range(top * columns, bottom * columns, columns)
                part = torch.cat([masks.read(slice(i + left, i + right)) for i in starts])  # (rows, columns, K)
                part = part.to(self.like.device)
                size = [length * patch for length in part.shape[:2]]
                pixels = F.interpolate(part.permute(2, 0, 1)[None], size=size, mode="bilinear")[0]
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


class _Encoded:
    """What becomes of the encoder's last tokens: logits, dense features, a decoder's input."""

    def __init__(self, run: _Run) -> None:
        self.run, self.model = run, run.encoder
        self.pool = self.model.global_pool if "logits" in run.wanted else None
        self.features = run._array("features") if "features" in run.wanted else None
        self.stage = run.stages[1] if len(run.stages) > 1 else None
        self.needs_nothing = self.pool is None and self.features is None and self.stage is None
        self.needs_prefix_only = self.pool == "token" and self.features is None and self.stage is None
        self.rows = None
        self.prefix = run.stages[0].prefix
        run.pooled.clear()
        if self.stage is not None:
            assert run.decoder is not None, "it has a stage"
            self.rows = run._open(len(run.stages[0].layers), 1)
            run._hand_on(self.rows, self.stage, run.decoder.class_embed, 0)

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
        if self.stage is not None and self.rows is not None and self.run.decoder is not None:
            patches = self.run.decoder.input_proj(grid)
            self.run._hand_on(self.rows, self.stage, patches, self.stage.prefix + first)

    def _pool(self, token: Tensor | None, grid: Tensor) -> None:
        pooled = self.run.pooled
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
            pooled, dtype = self.run.pooled, self.run.like.dtype
            if self.pool == "token":
                feature = pooled["token"]
            else:
                parts = []
                if "sum" in pooled:
                    parts.append((pooled["sum"] / math.prod(self.run.grid_size)).to(dtype))
                if "max" in pooled:
                    parts.append(pooled["max"])
                feature = sum(parts[1:], parts[0]) / len(parts)
            logits = self.model.head(self.model.head_drop(feature))
            file = self.run._array("logits")
            file.write(0, logits.to("cpu", compute_dtype(dtype)).numpy())
            file.complete()


class _Masks:
    """What becomes of the decoder's last tokens: a mask of each class."""

    def __init__(self, run: _Run) -> None:
        assert run.decoder is not None, "it has a stage"
        self.decoder, self.prefix = run.decoder, run.stages[1].prefix
        self.rows = run._rows("masks.bin", self.prefix, compute_dtype(run.like.dtype))
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


def _widest(block: Any) -> int:
    """Numbers that a layer's projections and feed-forward hold for a token."""
    mixer, mlp = block.attn, getattr(block, "mlp", None)
    inner = 6 * mixer.num_heads * mixer.head_dim * (1 if mixer.shared_qkv else 3)
    return inner + (0 if mlp is None else 2 * int(mlp[0].out_features))
