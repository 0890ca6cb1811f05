"""Time ``import cbsa_torch`` beyond ``import torch``: ``python scripts/import_time.py``.

Prints the medians of five fresh processes, in which every warning is an error; fails above :data:`LIMIT`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

LIMIT = 0.3
"""Seconds."""
CODE = """
import time
begin = time.perf_counter()
import torch
between = time.perf_counter()
import cbsa_torch
print(between - begin, time.perf_counter() - between)
"""


def time_imports() -> list[float]:
    """Seconds of both imports in a fresh process."""
    command = [sys.executable, "-W", "error", "-c", CODE]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(seconds) for seconds in printed.split()]


def main() -> int:
    """Measure and print; returns the exit code."""
    time_imports()  # reads the files from the disk
    torch, ours = (
        statistics.median(seconds) for seconds in zip(*(time_imports() for _ in range(5)), strict=True)
    )
    print(f"import torch: {torch:.2f} s; import cbsa_torch: {ours:.3f} s more, at most {LIMIT} s allowed")
    return 0 if ours <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
