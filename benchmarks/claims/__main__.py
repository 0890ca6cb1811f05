"""The paper's claims on real photographs.

    python -m benchmarks.claims small                              # lines and digits, in minutes
    python -m benchmarks.claims scratch  --cifar DIR               # block 1: from scratch on CIFAR-10
    python -m benchmarks.claims scratch  --only scratch_speed      # its speed, on a quiet machine
    python -m benchmarks.claims adapted  --cifar DIR --vit FILE    # block 2: a pretrained ViT adapted
    python -m benchmarks.claims adapted  --vit FILE --only adapted_cost     # its speed, on a quiet machine
    python -m benchmarks.claims decoders --camvid DIR --vit FILE   # block 3: decoders on CamVid
    python -m benchmarks.claims inside   --cifar DIR --camvid DIR --vit FILE    # block 4: attention maps
    python -m benchmarks.claims page                               # docs/results/claims.md and its plots

Each run has a record of its own in ``benchmarks/results/claims``, written when it is finished: the command can
be stopped at any time and goes on where it was, and two of them share the work. ``--list`` says what is left
and how long it takes. One thread a process.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from benchmarks.claims import adapted, decoders, inside, page, scratch, small
from benchmarks.claims.runs import Folders, Run, left_of, work_through

BLOCKS = {"small": small, "scratch": scratch, "adapted": adapted, "decoders": decoders, "inside": inside}


@dataclass(frozen=True)
class Options(Folders):
    """The paper's claims on real photographs."""

    block: tyro.conf.Positional[Literal["small", "scratch", "adapted", "decoders", "inside", "page"]] = "page"
    only: str = "*"
    """Names of the runs that are meant; * stands for anything. Timings are left out unless named in full."""
    list: bool = False
    """Print what is left, and do nothing."""


def main() -> None:
    """Do the runs of a block, or make the page."""
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1)
    if options.block == "page":
        page.write()
        return
    runs = BLOCKS[options.block].runs(options)
    chosen = [run for run in runs if is_chosen(run, options.only)]
    if options.list:
        for run in left_of(chosen):
            print(f"{run.name}  {run.minutes:.0f} minutes")
    else:
        work_through(chosen, options.runs / "locks")


def is_chosen(run: Run, only: str) -> bool:
    """Whether a run is meant."""
    return run.name == only or (fnmatch.fnmatch(run.name, only) and not run.quiet)


if __name__ == "__main__":
    main()
