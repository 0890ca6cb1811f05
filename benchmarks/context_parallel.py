"""What ranks of context parallel exchange per layer, how long a step takes, and the memory of a process.

    python benchmarks/context_parallel.py                    # 1, 2 and 4 processes
    python benchmarks/context_parallel.py --mixers cbsa --sides 32 64 --processes 1 2

Bytes are counted by wrapping the collectives (gloo), forward and backward apart. Time is that of forward and
backward of one layer in the slowest process, the median of some repetitions, one thread per process; memory is
the most that the process with the most tokens allocates at a time beyond its input. One process is the layer as
it is. Processes of one machine share its cores and memory bandwidth: figures of time say what the exchange
costs, not what a cluster gains.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro

from cbsa_torch._core.files import write_atomically
from cbsa_torch.bench.measure import memory
from cbsa_torch.nn import CBSA, TSSA, AgentAttention, LinearCBSA
from cbsa_torch.parallel import ContextParallel
from cbsa_torch.train.engine.console import number_table, print_table, say
from cbsa_torch.train.run.folder import environment

MIXERS = {
    "cbsa": CBSA,
    "cbsa certified": CBSA.with_options(step="certified"),
    "agent": AgentAttention,
    "linear_cbsa": LinearCBSA,
    "tssa": TSSA,
}


@dataclass(frozen=True)
class Options:
    """Measure layers whose tokens are shared by processes."""

    mixers: tuple[str, ...] = tuple(MIXERS)
    sides: tuple[int, ...] = (32, 64, 128, 256)
    """Of square grids of tokens."""
    processes: tuple[int, ...] = (1, 2, 4)
    dim: int = 384
    heads: int = 6
    repetitions: int = 5
    output: Path = Path("benchmarks/results/context_parallel.json")


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that this process gives to each collective."""
    found: list[int] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def wrap(name: str, place: int) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            found.append(args[place].numel() * args[place].element_size())
            return originals[name](*args, **kwargs)

        return called

    dist.all_reduce = wrap("all_reduce", 0)
    dist.all_gather = wrap("all_gather", 1)
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def measure(mixer: Any, side: int, options: Options, group: Any) -> dict[str, Any]:
    """One layer on a square grid of ``side`` rows, each rank with its share of the rows."""
    number, size = (0, 1) if group is None else (group.rank(), group.size())
    lengths = tuple(side * (side * (r + 1) // size - side * r // size) for r in range(size))
    parallel = None if group is None else ContextParallel(group, lengths, (side, side))
    layer = mixer(options.dim, options.heads)
    x = torch.randn(1, lengths[number], options.dim, requires_grad=True)
    where: dict[str, Any] = {"grid_size": (side, side)} if parallel is None else {"parallel": parallel}
    exchanged: list[list[int]] = []

    def step() -> None:
        with counted() as forward:
            out = layer(x, **where)
        with counted() as backward:
            out.sum().backward()
        exchanged[:] = [forward, backward]

    seconds = []
    for _ in range(options.repetitions + 1):  # the first warms up
        if group is not None:
            dist.barrier()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    most = torch.tensor(float(memory(step, "cpu").peak))
    slowest = torch.tensor(statistics.median(seconds[1:]))
    if group is not None:
        for value in (most, slowest):
            dist.all_reduce(value, dist.ReduceOp.MAX)
    return {
        "tokens": side * side,
        "processes": size,
        "bytes_forward": exchanged[0],
        "bytes_backward": exchanged[1],
        "seconds": slowest.item(),
        "memory_bytes": int(most),
    }


def rank(options: Options, size: int, number: int, folder: str) -> None:
    """One process of some; the first writes what was measured into the folder."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    group = None
    if size > 1:
        store, limit = f"file://{folder}/store_{size}", timedelta(minutes=5)
        dist.init_process_group("gloo", init_method=store, rank=number, world_size=size, timeout=limit)
        group = dist.group.WORLD
    rows = []
    for name in options.mixers:
        for side in sorted(options.sides):
            rows.append({"mixer": name, **measure(MIXERS[name], side, options, group)})
            if number == 0:
                say(f"{name}, {side * side:,} tokens, {size} processes: {1e3 * rows[-1]['seconds']:.1f} ms")
    if number == 0:
        Path(folder, f"{size}.json").write_text(json.dumps(rows))
    if group is not None:
        dist.destroy_process_group()


def measure_processes(options: Options, size: int, folder: str) -> list[dict[str, Any]]:
    """All layers, shared by ``size`` processes."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank, args=(options, size, number, folder)) for number in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a process of {size} ended with {process.exitcode}")
    rows: list[dict[str, Any]] = json.loads(Path(folder, f"{size}.json").read_text())
    return rows


def main() -> None:
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for size in options.processes for row in measure_processes(options, size, folder)]
    table = number_table("mixer", "tokens", "processes", "KiB forward", "backward", "ms", "MiB", left=1)
    for row in rows:
        exchanged = [f"{sum(row[f'bytes_{way}']) / 1024:.1f}" for way in ("forward", "backward")]
        cost = f"{1e3 * row['seconds']:.1f}", f"{row['memory_bytes'] / 2**20:.0f}"
        table.add_row(row["mixer"], f"{row['tokens']:,}", str(row["processes"]), *exchanged, *cost)
    print_table(table)
    given = {key: str(value) for key, value in vars(options).items() if key != "output"}
    record = {"environment": environment(), "options": given, "cores": os.cpu_count(), "rows": rows}
    write_atomically(options.output, (json.dumps(record, indent=1) + "\n").encode())
    say(f"results: {options.output}")


if __name__ == "__main__":
    main()
