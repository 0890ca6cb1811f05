"""What ranks of context parallel exchange per layer, how long a step takes, and the memory of a process.

    torchrun --standalone --nproc-per-node 2 benchmarks/context_parallel.py --output results.json

Bytes are counted by wrapping the collectives, forward and backward apart. Time is that of forward and backward
of one layer, the median of some repetitions; memory is the largest resident set of any process over that
before. One process (without torchrun) is the layer as it is. Processes of one machine share its cores and
memory bandwidth: figures of time say what the exchange costs, not what a cluster gains.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cbsa_torch.nn import CBSA, TSSA, AgentAttention, LinearCBSA
from cbsa_torch.parallel import ContextParallel

MIXERS = {
    "cbsa": CBSA,
    "cbsa certified": CBSA.with_options(step="certified"),
    "agent": AgentAttention,
    "linear_cbsa": LinearCBSA,
    "tssa": TSSA,
}


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


def measure(mixer: Any, side: int, args: argparse.Namespace, group: Any) -> dict[str, Any]:
    """One layer on a square grid of ``side`` rows, each rank with its share of the rows."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    lengths = tuple(side * (side * (r + 1) // size - side * r // size) for r in range(size))
    parallel = None if group is None else ContextParallel(group, lengths, (side, side))
    layer = mixer(args.dim, args.heads)
    x = torch.randn(1, lengths[rank], args.dim, requires_grad=True)
    where: dict[str, Any] = {"grid_size": (side, side)} if parallel is None else {"parallel": parallel}
    exchanged: list[list[int]] = []
    seconds = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(args.repeat + 1):  # the first warms up
        if group is not None:
            dist.barrier()
        start = time.perf_counter()
        with counted() as forward:
            out = layer(x, **where)
        with counted() as backward:
            out.sum().backward()
        exchanged = [forward, backward]
        seconds.append(time.perf_counter() - start)
    memory = torch.tensor(float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    slowest = torch.tensor(statistics.median(seconds[1:]))
    if group is not None:
        for value in (memory, slowest):
            dist.all_reduce(value, dist.ReduceOp.MAX)
    return {
        "tokens": side * side,
        "processes": size,
        "bytes_forward": exchanged[0],
        "bytes_backward": exchanged[1],
        "seconds": slowest.item(),
        "memory_bytes": int(memory),
    }


def main() -> None:
    """Measure and print; the first process writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="*", choices=MIXERS, default=list(MIXERS), help="which layers")
    parser.add_argument("--sides", nargs="*", type=int, default=[32, 64, 128, 256], help="of square grids")
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    group = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    torch.manual_seed(0)
    rows = []
    for name in args.mixers:
        for side in sorted(args.sides):  # growing: the largest resident set never falls
            row = {"mixer": name, **measure(MIXERS[name], side, args, group)}
            rows.append(row)
            if group is None or group.rank() == 0:
                exchanged = [sum(row[f"bytes_{way}"]) / 1024 for way in ("forward", "backward")]
                print(
                    f"{name:15} {row['tokens']:8,} tokens: {exchanged[0]:7.1f} + {exchanged[1]:7.1f} KiB, "
                    f"{1e3 * row['seconds']:8.1f} ms, {row['memory_bytes'] / 2**20:7.0f} MiB more",
                    flush=True,
                )
    if args.output and (group is None or group.rank() == 0):
        settings = {"dim": args.dim, "heads": args.heads, "torch": torch.__version__}
        settings |= {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
        args.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    if group is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
