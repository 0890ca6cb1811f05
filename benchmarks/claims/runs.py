"""Runs with a record each: what is left is what has no record, and several processes share it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.inside import rounded
from cbsa_torch._core.files import write_atomically
from cbsa_torch.train.run.folder import environment

RESULTS = Path("benchmarks/results/claims")
FLAGS = ("--cifar", "--camvid", "--emoji", "--vit")
"""Of the command, whose values are places on a machine."""
POLL = 20.0
"""Seconds until runs that wait for those of another process are looked at again."""


@dataclass(frozen=True)
class Folders:
    """Where things are."""

    cifar: Path | None = None
    """CIFAR-10: DIR/{train,test}/CLASS/*.jpg."""
    camvid: Path | None = None
    """CamVid: DIR/{train,val,test}/{images,masks}."""
    emoji: Path | None = None
    """Folder of emoji64.npz. Default: where `cbsa data fetch` puts it."""
    vit: Path | None = None
    """The pretrained ViT-S/14, as `python -m benchmarks.claims.vit` writes it."""
    runs: Path = Path("runs/claims")
    """Folder of the runs."""


class Measured(NamedTuple):
    """What came out of a run."""

    values: dict[str, Any]
    log: Path
    """Its raw log, whose hash is recorded."""


@dataclass(frozen=True)
class Run:
    """One training run or measurement."""

    name: str
    """Of its record and its folder; its block comes first."""
    minutes: float
    """That it takes, about, on one thread."""
    measure: Callable[[], Measured]
    """Do it, or go on with it."""
    seed: int | None = None
    needs: tuple[str, ...] = ()
    """Names of the runs whose records it reads."""
    quiet: bool = False
    """Whether it times something: it is done if --only names it, on a machine that is at rest."""


def record_of(name: str) -> Path:
    """The file that says what a run measured."""
    return RESULTS / f"{name}.json"


def read(name: str) -> dict[str, Any]:
    """The record of a finished run."""
    record: dict[str, Any] = json.loads(record_of(name).read_text())
    return record


def left_of(runs: Sequence[Run]) -> list[Run]:
    """Those without a record, in the same order."""
    return [run for run in runs if not record_of(run.name).exists()]


def work_through(runs: Sequence[Run], locks: Path) -> None:
    """Do what is left, one run after the other; other processes of the same command may do the same.

    A run that another process is at is left to it; one whose records are missing waits for them.
    """
    known = {run.name for run in runs}
    for run in left_of(runs):
        missing = [name for name in run.needs if name not in known and not record_of(name).exists()]
        if missing:
            raise SystemExit(
                f"{run.name} needs {', '.join(missing)}: not done, and not among the runs asked for"
            )
    while left := left_of(runs):
        for run in left:
            if all(record_of(name).exists() for name in run.needs) and _do(run, locks, left):
                break
        else:
            time.sleep(POLL)


def _do(run: Run, locks: Path, left: Sequence[Run]) -> bool:
    """Do one run and record it, unless another process is at it or has done it."""
    with _locked(locks / f"{run.name}.lock") as mine:
        if not mine:
            return False
        if not record_of(run.name).exists():
            hours = sum(other.minutes for other in left) / 60
            print(
                f"== {run.name}; {len(left)} runs are left, about {hours:.1f} hours of one thread", flush=True
            )
            start = time.perf_counter()
            write(run, run.measure(), (time.perf_counter() - start) / 60)
    return True


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether this process has the lock, which ends with the context or the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def write(run: Run, measured: Measured, minutes: float) -> None:
    """Write the record, whole or not at all; ``minutes`` are those since the run was last begun."""
    folders = [part for flag in FLAGS if flag in sys.argv for part in (flag, "PATH")]
    command = ["python", "-m", "benchmarks.claims", *sys.argv[1:2], *folders, "--only", run.name]
    record = {
        "name": run.name,
        "command": shlex.join(command),
        "seed": run.seed,
        "minutes": minutes,
        "log_sha256": hashlib.sha256(measured.log.read_bytes()).hexdigest(),
        "environment": environment(),
        **measured.values,
    }
    record_of(run.name).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(record_of(run.name), (json.dumps(rounded(record), indent=1) + "\n").encode())
