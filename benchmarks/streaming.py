"""An image larger than memory through CBT-T: resident memory, scratch and time against the number of tokens.

    python benchmarks/streaming.py                    # up to 10 million tokens: hours, 15 GB of scratch
    python benchmarks/streaming.py --sides 316        # 100,000 tokens: a few minutes
    python benchmarks/streaming.py --sides 316 --kills 10

The image is a function of its coordinates and lies in no file. Each size runs in a process of its own, which
reads its anonymous resident memory (RssAnon of Linux: what the process holds, without files and caches) twenty
times a second. Sizes that fit are also run in memory, and compared. ``--kills`` instead kills streams of the
first size with SIGKILL, each at a random moment, lets the same call go on, and compares with a run that nobody
disturbed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import tyro
from timm.utils import reparameterize_model

from cbsa_torch import interpret
from cbsa_torch._core.files import write_atomically
from cbsa_torch.models import WhiteBoxTransformer
from cbsa_torch.streaming import StreamResult, stream
from cbsa_torch.streaming.files import STATE
from cbsa_torch.streaming.pixels import Pixels
from cbsa_torch.train.engine.console import Reporter, number_table, print_table, say
from cbsa_torch.train.run.folder import environment

PATCH = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESULTS: tuple[Any, ...] = ("logits", "map")
SPAWN = multiprocessing.get_context("spawn")
FORKSERVER = multiprocessing.get_context("forkserver")
"""Of processes to be killed, which then need not import anything."""
FORKSERVER.set_forkserver_preload(["timm", "cbsa_torch.streaming", "cbsa_torch.train"])


@dataclass(frozen=True)
class Options:
    """Stream generated images through CBT-T."""

    sides: tuple[int, ...] = (316, 548, 1000, 1732, 3168)
    """Tokens along the sides of the images."""
    memory: str = "2GiB"
    """The budget of every stream."""
    scratch_dtype: str = "float32"
    """Of the tokens between layers; or bfloat16."""
    threads: int = 2
    """CPU threads."""
    in_memory: int = 110_000
    """The most tokens that are also run in memory."""
    kills: int = 0
    """Streams of the first size to be killed."""
    seed: int = 0
    """Of the moments."""
    scratch: Path | None = None
    """A folder for results and scratch. Default: the system's for temporary files."""
    output: Path = Path("benchmarks/results/streaming.json")
    """The record; beside it the class-token map of the largest image, and with --kills a record of its own."""


class Generated:
    """An image that is a function of its coordinates: coloured discs on textures of several scales."""

    dtype = np.dtype("uint8")

    def __init__(self, side: int) -> None:
        self.shape = (side, side, 3)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray[Any, Any]:
        rows, columns = (np.arange(part.start, part.stop, dtype=np.int32) for part in index[:2])
        side, image = self.shape[0], np.empty((len(rows), len(columns), 3), np.uint8)
        y, x = rows[:, None], columns[None]
        fine = (y * 7 + x * 13) ^ (y * 3 - x * 5)
        image[..., 0] = (fine & 63) + (y * 191 // side)
        image[..., 1] = (fine >> 3 & 63) + (x * 191 // side)
        cell = max(side // 8, 1)
        distance = (y % cell - cell // 2) ** 2 + (x % cell - cell // 2) ** 2  # below 2^31 up to a side of 2^18
        radius = (cell * (1 + (rows // cell)[:, None] % 4 + columns[None] // cell % 3)) // 14
        image[..., 2] = np.where(distance < radius**2, 200, 20) + (fine >> 5 & 31)
        return image


def build() -> WhiteBoxTransformer:
    """CBT-T with drawn weights, fused as commands fuse it; positions are small, so that maps show the image."""
    torch.manual_seed(0)
    model: WhiteBoxTransformer = reparameterize_model(timm.create_model("cbt_tiny_patch16_224").eval())
    model.pos_embed.data.mul_(0.05)
    return model


def call(
    options: Options, side: int, folder: Path, progress: Any = None, results: Any = RESULTS
) -> StreamResult:
    """One stream."""
    image, dtype = Generated(side * PATCH), getattr(torch, options.scratch_dtype)
    given: Any = {"results": results, "mean": MEAN, "std": STD, "memory": options.memory, "progress": progress}
    return stream(build(), image, folder, scratch_dtype=dtype, **given)


def resident(line: str = "RssAnon") -> int:
    """Bytes that are resident in this process."""
    found = re.search(rf"^{line}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "of Linux"
    return int(found[1]) * 1024


class Watch:
    """The most anonymous memory while the context is open, as another thread sees it."""

    def __enter__(self) -> Watch:
        self.most, self.ended = resident(), threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(0.05):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.most = max(self.most, resident())


def measure(options: Options, side: int, folder: Path) -> dict[str, Any]:
    """Memory, scratch and time of one size, in this process."""
    torch.set_num_threads(options.threads)
    build()
    before, begin, names = resident(), time.monotonic(), dict[str, float]()
    with Watch() as watch, Reporter().work() as show:

        def progress(done: float, total: float, name: str) -> None:
            names[name] = time.monotonic() - begin
            if show is not None:
                show(done, total, name)

        result = call(options, side, folder, progress)
    seconds = time.monotonic() - begin
    ends = [0.0, *names.values()]
    sweeps = {name: end - start for name, start, end in zip(names, ends, ends[1:], strict=False)}
    return {
        "side": side,
        "tokens": side**2,
        "pixels": (side * PATCH) ** 2,
        "seconds": seconds,
        "seconds_embedding": sweeps["embed"],
        "rss_anon_before": before,
        "rss_anon_most": watch.most,
        "scratch_bytes": result.scratch_bytes,
        "top": torch.topk(result.logits[0], 3).indices.tolist() if result.logits is not None else [],
    }


def compare(options: Options, side: int, folder: Path) -> dict[str, float]:
    """Largest differences from the model in memory, relative to the largest value, in this process."""
    torch.set_num_threads(options.threads)
    image, model = Generated(side * PATCH), build()
    pixels = Pixels(image, "last", 3, MEAN, STD).read(slice(0, side * PATCH), model.cls_token)
    found = call(options, side, folder, results=("logits", "map", "features"))
    with torch.inference_mode(), interpret.capture(model, layers=[-1]) as records:
        tokens = model.forward_features(pixels)
        logits = model.forward_head(tokens)
    (record,) = records.values()
    expected = {
        "logits": logits,
        "map": interpret.cls_attention_maps(record)[0],
        "features": tokens[0, 1:].unflatten(0, (side, side)),
    }
    differences = {}
    for name, value in expected.items():
        streamed = torch.from_numpy(np.load(found.files[name]))
        differences[name] = ((streamed - value).abs().max() / value.abs().max()).item()
    return differences


def in_a_process(function: Any, *args: Any) -> Any:
    """What ``function`` returns in a fresh process."""
    with SPAWN.Pool(1) as pool:
        return pool.apply(function, args)


def sizes(options: Options, root: Path) -> dict[str, Any]:
    """All sizes, the smallest first."""
    rows = []
    for side in sorted(options.sides):
        folder = root / str(side)
        row = in_a_process(measure, options, side, folder)
        if side**2 <= options.in_memory:
            row["in_memory"] = in_a_process(compare, options, side, root / f"{side}_compared")
        rows.append(row)
        text = f"{row['tokens']:,} tokens: {row['seconds']:.0f} s, {row['rss_anon_most'] / 2**30:.2f} GiB"
        say(f"{text}, scratch {row['scratch_bytes'] / 1e9:.2f} GB {row.get('in_memory', '')}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / str(max(options.sides)) / "map.png", options.output.with_suffix(".png"))
    table = number_table("tokens", "s", "s / million", "RssAnon GiB", "scratch GB", left=0)
    for row in rows:
        million = row["seconds"] / row["tokens"] * 1e6
        memory, scratch = row["rss_anon_most"] / 2**30, row["scratch_bytes"] / 1e9
        texts = (
            f"{row['tokens']:,}",
            f"{row['seconds']:.1f}",
            f"{million:.0f}",
            f"{memory:.2f}",
            f"{scratch:.2f}",
        )
        table.add_row(*texts)
    print_table(table)
    return {"sizes": rows}


def run_here(options: Options, side: int, folder: Path) -> None:
    """A stream that may be killed, in this process."""
    torch.set_num_threads(options.threads)
    call(options, side, folder)


def start(options: Options, side: int, folder: Path) -> tuple[Any, float]:
    """A stream in a process of its own, and when it began to write."""
    process = FORKSERVER.Process(target=run_here, args=(options, side, folder))
    process.start()
    while process.is_alive() and not (folder / "scratch" / STATE).exists():
        time.sleep(0.01)
    return process, time.monotonic()


def contents(folder: Path) -> dict[str, bytes]:
    """The results of a stream."""
    return {f"{name}.npy": (folder / f"{name}.npy").read_bytes() for name in RESULTS}


def finished_sweeps(folder: Path) -> int:
    """How many a stream that is not done has finished."""
    data = (folder / "scratch" / STATE).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return int(header["__metadata__"]["finished"])


def kills(options: Options, root: Path) -> dict[str, Any]:
    """Kill streams at random moments, and let the same call go on."""
    side, draw = options.sides[0], random.Random(options.seed)
    process, begin = start(options, side, root / "whole")
    process.join()
    length = time.monotonic() - begin
    assert process.exitcode == 0, "nobody disturbed it"
    expected = contents(root / "whole")
    rows: list[dict[str, Any]] = []
    while len(rows) < options.kills:
        folder = root / f"killed_{len(rows)}"
        process, _ = start(options, side, folder)
        after = draw.uniform(0, length)
        time.sleep(after)
        if not process.is_alive() or (folder / "result.json").exists():  # too late: another moment
            process.join()
            shutil.rmtree(folder)
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        assert not (folder / "result.json").exists(), "there is work left"
        sweeps = finished_sweeps(folder)
        process, begin = start(options, side, folder)
        process.join()
        assert process.exitcode == 0, "it goes on"
        same = contents(folder) == expected
        rows.append(
            {
                "after": after,
                "finished_sweeps": sweeps,
                "seconds_to_end": time.monotonic() - begin,
                "same_bits": same,
            }
        )
        say(f"killed after {after:.1f} s of {length:.1f} s, {sweeps} sweeps finished: same bits: {same}")
        shutil.rmtree(folder)
    return {"side": side, "tokens": side**2, "seconds": length, "kills": rows}


def main() -> None:
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="cbsa_streaming_") as folder:
        found = kills(options, Path(folder)) if options.kills else sizes(options, Path(folder))
    given = {key: str(value) for key, value in vars(options).items() if key not in ("output", "scratch")}
    record = {"environment": environment(), "options": given, **found}
    output = options.output.with_name(f"{options.output.stem}_kills.json") if options.kills else options.output
    write_atomically(output, (json.dumps(record, indent=2) + "\n").encode())
    say(f"results: {output}")
    if options.kills and not all(row["same_bits"] for row in found["kills"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
