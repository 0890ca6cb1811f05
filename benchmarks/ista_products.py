"""ISTA by one product with the tokens against the equation's two: which is faster, by tokens and channels.

    python benchmarks/ista_products.py --threads 2     # a minute; prints a table, writes benchmarks/results/

:func:`cbsa_torch.ops.ista_step` takes one product from as many tokens on as there are channels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from cbsa_torch import ops
from cbsa_torch._core.files import write_atomically
from cbsa_torch.bench import measure
from cbsa_torch.ops.ista import ista_by_matrix, ista_equation
from cbsa_torch.train.run.folder import environment

STEP = SPARSITY = 0.1
TOKENS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""In channels."""


@dataclass
class Options:
    """Time ISTA by one product and by two."""

    dims: tuple[int, ...] = (192, 384, 768)
    threads: int = 2
    repetitions: int = 15
    output: Path = Path("benchmarks/results/ista_products.json")


def one(tokens: Tensor, dictionary: Tensor) -> Tensor:
    """By one product, with its matrix made anew."""
    return ista_by_matrix(tokens, ops.ista_matrix(dictionary, step_size=STEP), STEP * SPARSITY)


def kept(tokens: Tensor, matrix: Tensor) -> Tensor:
    """By one product with a matrix that is kept, as in a fused layer."""
    return ista_by_matrix(tokens, matrix, STEP * SPARSITY)


def two(tokens: Tensor, dictionary: Tensor) -> Tensor:
    """By the equation."""
    return ista_equation(tokens, dictionary, STEP, SPARSITY)


def step(function: Any, tokens: Tensor, dictionary: Tensor) -> None:
    """Forward and backward."""
    tokens.grad = dictionary.grad = None
    function(tokens, dictionary).sum().backward()


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(options.threads)
    rows = []
    print("channels  tokens   two / one: forward  matrix kept  training step")
    for dim in options.dims:
        for factor in TOKENS:
            tokens = torch.randn(int(factor * dim), dim)
            dictionary = torch.nn.init.kaiming_uniform_(torch.empty(dim, dim))
            matrix = ops.ista_matrix(dictionary, step_size=STEP)
            trained = tokens.clone().requires_grad_(), dictionary.clone().requires_grad_()
            functions: dict[str, Any] = {
                "two": partial(two, tokens, dictionary),
                "one": partial(one, tokens, dictionary),
                "kept": partial(kept, tokens, matrix),
                "two, step": partial(step, two, *trained),
                "one, step": partial(step, one, *trained),
            }
            times = measure.interleaved(functions, "cpu", repetitions=options.repetitions, budget=10)
            took = measure.medians(times)
            row = {
                "channels": dim,
                "tokens": len(tokens),
                "forward": took["two"] / took["one"],
                "kept": took["two"] / took["kept"],
                "step": took["two, step"] / took["one, step"],
            }
            rows.append(row)
            print(
                f"{dim:8}{len(tokens):8}{row['forward']:21.2f}{row['kept']:13.2f}{row['step']:15.2f}",
                flush=True,
            )
    record = {"environment": environment(), "threads": options.threads, "rows": rows}
    write_atomically(options.output, json.dumps(record, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
