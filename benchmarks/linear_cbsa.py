"""Choose the solver of Eq. 12: time and error of a Cholesky solve and of an eigendecomposition.

    python benchmarks/linear_cbsa.py [--device cuda] [--output benchmarks/results/NAME.json]

Times are medians of interleaved repetitions of forward and backward; errors are relative to a singular value
decomposition in float64, for float64 tokens.
"""

from __future__ import annotations

import datetime
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cbsa_torch import ops
from cbsa_torch._core.types import LinearSolver
from cbsa_torch.train.run.folder import environment

SOLVERS: tuple[LinearSolver, ...] = ("cholesky", "eigh")
EPSILONS = (1.0, 0.1, 0.01)


@dataclass
class Options:
    """Compare the solvers."""

    device: str = "cpu"
    tokens: tuple[int, ...] = (64, 197, 1024, 4096)
    head_dims: tuple[int, ...] = (24, 64, 128)
    num_heads: int = 6
    batch_size: int = 8
    repetitions: int = 9
    threads: int = 2
    """CPU threads."""
    output: Path = Path("benchmarks/results/linear_cbsa.json")


def step(w: Tensor, solver: LinearSolver) -> float:
    """Wall time of a forward and backward pass."""
    if w.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    ops.linear_cbsa(w, eps=1.0, average=True, solver=solver).sum().backward()
    if w.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def error(w: Tensor, solver: LinearSolver, eps: float) -> float:
    """Largest error over the largest entry, against W = R S L^T -> R S / (1 + S^2 / eps^2) L^T."""
    r, s, lt = torch.linalg.svd(w, full_matrices=False)
    expected = (r * (s / (1 + s**2 / eps**2))[..., None, :]) @ lt
    actual = ops.linear_cbsa(w, eps=eps, solver=solver)
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def measure(options: Options) -> list[dict[str, Any]]:
    """Time and check every size."""
    rows = []
    for p in options.head_dims:
        for n in options.tokens:
            torch.manual_seed(0)
            w = torch.randn(options.batch_size, options.num_heads, n, p, device=options.device)
            w.requires_grad_()
            times: dict[LinearSolver, list[float]] = {solver: [] for solver in SOLVERS}
            for repetition in range(options.repetitions + 1):
                for solver in SOLVERS:
                    seconds = step(w, solver)
                    if repetition:  # the first warms up
                        times[solver].append(seconds)
            medians = {solver: statistics.median(values) for solver, values in times.items()}
            exact = w.detach()[:1].double().cpu()
            row: dict[str, Any] = {"tokens": n, "head_dim": p}
            row |= {f"{solver}_ms": 1e3 * medians[solver] for solver in SOLVERS}
            row["eigh_over_cholesky"] = medians["eigh"] / medians["cholesky"]
            for solver in SOLVERS:
                row[f"{solver}_error"] = max(error(exact, solver, eps) for eps in EPSILONS)
            rows.append(row)
    return rows


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    rows = measure(options)
    table = Table("tokens", "P", "Cholesky ms", "eigh ms", "eigh / Cholesky", "Cholesky error", "eigh error")
    for row in rows:
        cells = [f"{row[key]:.1f}" for key in ("cholesky_ms", "eigh_ms", "eigh_over_cholesky")]
        cells += [f"{row[key]:.0e}" for key in ("cholesky_error", "eigh_error")]
        table.add_row(str(row["tokens"]), str(row["head_dim"]), *cells)
    Console().print(table)
    record = {
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "options": {key: str(value) for key, value in vars(options).items()},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"results: {options.output}")


if __name__ == "__main__":
    main()
