"""A trained model over a source that does not fit into memory: checked, done sweep by sweep, continued."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cbsa_torch._core.files import write_atomically
from cbsa_torch._core.precision import no_autocast
from cbsa_torch.models import TokenSetTransformer
from cbsa_torch.streaming.accepted import Result, parse_bytes, parts_of
from cbsa_torch.streaming.arrays import SlicedArray
from cbsa_torch.streaming.files import (
    OWNER,
    STATE,
    Lock,
    Owner,
    State,
    StreamError,
    check_space,
    differences,
    told_when_full,
)
from cbsa_torch.streaming.pixels import Channels, PixelEmbedding, Pixels, padded_size
from cbsa_torch.streaming.plan import Plan
from cbsa_torch.streaming.sets import FeatureEmbedding
from cbsa_torch.streaming.store import Store
from cbsa_torch.streaming.sweeps import Sweeps

Progress = Callable[[float, float, str], None]
"""Called after each chunk with the work done, all work, and what is being done."""

DONE, PICTURE = "result.json", "map.png"


class StreamResult(NamedTuple):
    """What a stream made.

    Examples:
        >>> import numpy as np, timm
        >>> from cbsa_torch.streaming import stream
        >>> model = timm.create_model("cbt_nano_patch4_32", depth=1).eval()
        >>> result = stream(model, np.zeros((64, 96, 3), np.uint8), "map", results=["map"])
        >>> result.files["map"].name, np.load(result.files["map"]).shape
        ('map.npy', (4, 16, 24))
    """

    folder: Path
    """Where the files are."""
    grid_size: tuple[int, ...]
    """Of the tokens, ``(h, w)``; of a set ``(N,)``."""
    logits: Tensor | None
    """``(1, num_classes)``, if they were asked for."""
    files: dict[str, Path]
    """By result: ``logits.npy``, ``map.npy`` ``(H, h, w)``, ``features.npy`` ``(h, w, C)``, ``labels.npy``
    ``(height, width)``; and ``map.png`` as ``"picture"``. Of a set, N is in the place of h, w."""
    scratch_bytes: int
    """The most that the scratch files held."""


@torch.inference_mode()
def stream(
    model: nn.Module,
    source: SlicedArray,
    folder: str | Path,
    *,
    coords: SlicedArray | None = None,
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
    """Apply a trained model to an image or a set of features that does not fit into memory: exactly.

    Killed at any moment, the same call goes on from the last finished sweep, and once it is done returns what
    it made. Repeated and continued runs give the same bits; with another ``memory`` sums are taken in another
    order, so that results agree to rounding.

    Args:
        model: a :class:`cbsa_torch.models.WhiteBoxTransformer`, or a :class:`cbsa_torch.models.Segmenter` of
            one, or a :class:`cbsa_torch.models.TokenSetTransformer`, in evaluation mode, on any device. Layers
            of CBSA (pooled or learned representatives, any kind of step), AgentAttention, LinearCBSA and TSSA.
        source: an image ``(height, width, channels)``, or ``(height, width)`` for one channel, or features
            ``(N, in_dim)``: what has a shape and a dtype and takes slices, such as :func:`open_array` returns.
            It is read once, in order.
        folder: for the results.
        coords: of a set, ``(N, k)``: where its features are, see :func:`open_features`. They are read into
            memory.
        results: of ``"logits"``; ``"map"``, how much the class token attends to each token in a layer of the
            encoder (:func:`cbsa_torch.interpret.cls_attention_maps`), with a picture; ``"features"``, the
            normalised tokens of the encoder; ``"labels"``, the class of each pixel. Default: the labels of a
            segmenter, else the logits.
        layer: of the map; negative numbers count from the last.
        channels: whether they are the ``"last"`` axis of ``source`` or the ``"first"``.
        mean, std: of the channels, subtracted and divided by (integers are divided by the largest of their
            dtype before). Default: 0 and 1.
        memory: bytes for what is held of source and tokens at once, or a text such as ``"2GiB"``. The model and
            the libraries come on top.
        scratch: a folder for the tokens between layers, which take about twice their size; removed when all is
            done. Default: ``folder/scratch``.
        scratch_dtype: of these tokens. Default: the model's; ``torch.bfloat16`` takes half as much and rounds.
        progress: see :data:`Progress`.

    Raises:
        ValueError, TypeError: a model, an image or options that cannot be streamed; nothing is read then.
        StreamError: a disk without room, files of another stream, an image or a model that changed.

    Examples:
        >>> import numpy as np, timm
        >>> from cbsa_torch.streaming import stream
        >>> scan = np.zeros((64, 96, 3), np.uint8)  # or open_array("scan.npy")
        >>> model = timm.create_model("cbt_nano_patch4_32", depth=1).eval()
        >>> result = stream(model, scan, "out", memory="100MB")
        >>> result.grid_size, result.logits.shape
        ((16, 24), torch.Size([1, 10]))
    """
    encoder, decoder = parts_of(model)
    with no_autocast(encoder.cls_token):
        budget, size = parse_bytes(memory), None
        embedding: PixelEmbedding | FeatureEmbedding
        if isinstance(encoder, TokenSetTransformer):
            if channels != "last" or mean or std:
                raise ValueError("channels, mean and std are of images, and the model takes sets of features")
            embedding = FeatureEmbedding(encoder, source, coords, budget)
        else:
            if coords is not None:
                raise ValueError("coords are of sets of features, and the model takes images")
            pixels = Pixels(source, channels, encoder.in_chans, mean, std)
            size = pixels.size
            padded = size if decoder is None else padded_size(size, encoder.stem.patch_size)
            embedding = PixelEmbedding(encoder, pixels, padded)
        plan = Plan(
            model,
            embedding,
            size=size,
            results=results,
            layer=layer,
            budget=budget,
            scratch_dtype=scratch_dtype,
        )
        folder = Path(folder)
        run = _Run(plan, folder, folder / "scratch" if scratch is None else Path(scratch))
        return run.run(progress)


class _Run:
    """A plan, its folders, and what was done of it before."""

    def __init__(self, plan: Plan, folder: Path, scratch: Path) -> None:
        self.plan, self.folder, self.scratch = plan, folder, scratch
        self.paths, self.arrays = plan.scratch_files(scratch), plan.arrays()

    def run(self, progress: Progress | None) -> StreamResult:
        """All sweeps that are not finished."""
        with told_when_full(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            done = self._finished()
            if done is not None:
                self._clean()
                return done
            with ExitStack() as files:
                self._run(files, progress)
            result = self._finished()
        assert result is not None, "just written"
        return result

    def _run(self, files: ExitStack, progress: Progress | None) -> None:
        plan, state = self.plan, State(self.scratch, self.plan.fingerprint)
        files.callback(state.close)
        outputs = [self.folder / f"{name}.npy" for name in self.arrays]
        drawn = [self.folder / PICTURE] if "map" in self.arrays else []
        taken = [path for path in (*outputs, *drawn) if path.exists()]
        if taken and state.finished == 0:
            raise StreamError(f"{taken[0]} is there already; give another folder for the results")
        owner = Owner(self.folder, state)
        files.callback(owner.close)
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.arrays.values())
        parts = [path.with_name(f"{path.name}.part") for path in outputs]
        scratch = self.scratch, sum(self.paths.values()), self.paths
        check_space([scratch, (self.folder, size, [*outputs, *parts])])
        sweeps = Sweeps(Store(plan, self.folder, self.scratch, files))
        sweeps.restore(state)
        total = sum(map(plan.cost, plan.sweeps))
        work = sum(map(plan.cost, plan.sweeps[: state.finished]))
        for i, sweep in enumerate(plan.sweeps[state.finished :], state.finished):
            name = plan.name(sweep)
            for tokens in sweeps.do(sweep):
                work += plan.cost(sweep, tokens)
                if progress is not None:
                    progress(min(work, total), total, name)
            state.save(i + 1, sweeps.to_save(i + 1))
        if "map" in self.arrays:
            plan.embedding.draw(self.folder / "map.npy", self.folder / PICTURE)
        record = {
            "fingerprint": plan.fingerprint,
            "grid_size": plan.grid_size,
            "scratch_bytes": sum(path.stat().st_size for path in self.paths if path.exists()),
        }
        write_atomically(self.folder / DONE, json.dumps(record, indent=2).encode())
        state.remove(self.paths)
        owner.remove()

    def _clean(self) -> None:
        """Remove what a process left that was killed at its very end."""
        with suppress(StreamError):  # another stream's by now
            if (self.scratch / STATE).is_file():
                State(self.scratch, self.plan.fingerprint).remove(self.paths)
            if (self.folder / OWNER).is_file():
                Lock(self.folder / OWNER).remove()

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
        if theirs != self.plan.fingerprint:
            differ = " and ".join(differences(theirs, self.plan.fingerprint))
            raise StreamError(f"{self.folder} holds results of another {differ}; give another folder")
        files = {name: self.folder / f"{name}.npy" for name in self.arrays}
        missing = [path for path in files.values() if not path.exists()]
        if missing:
            raise StreamError(f"{missing[0]} was made and is gone; remove {path}, or give another folder")
        logits = torch.from_numpy(np.load(files["logits"])) if "logits" in files else None
        picture = self.folder / PICTURE
        if "map" in files and picture.exists():
            files["picture"] = picture
        return StreamResult(self.folder, self.plan.grid_size, logits, files, record["scratch_bytes"])
