"""Bags of real digits, "does it contain a nine": AUC of models of sets beside the usual baselines, three seeds.

    python benchmarks/bags_of_digits.py [--models cbsa gated] [--seeds 0 1 2]

A bag has 10 to 500 of scikit-learn's digits (log-uniform), as standardised pixels (64 numbers each), at random
places of a square that tell nothing. Half of the bags hold nines, 1 % of the digits and at least one; the
others hold none. Training, validation and test bags are made of the training, validation and test images of the
recipe ``digits``, so that no test image was trained on. Every model is trained alike; the epoch with the best
validation AUC is kept.

With all models the results go to ``benchmarks/results/bags_of_digits.json`` and, as a table, into
``docs/results/small_models.md``; with some, they are printed alone.
"""

from __future__ import annotations

import copy
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

from cbsa_torch.bench.baselines import GatedAttentionMIL, MeanPooling, NystromAggregator
from cbsa_torch.models import TokenSetTransformer
from cbsa_torch.train.data.arrays import open_digits
from cbsa_torch.train.run.folder import environment

IN_DIM, DIM, DEPTH, HEADS, SUMMARIES = 64, 64, 2, 4, 16
"""Width of the features and of all models; layers and heads; representatives, agents or landmarks."""
NINE = 9
SIZES = (10, 500)
"""Fewest and most digits of a bag."""
SHARE = 0.01
"""Share of nines in a bag that holds any; at least one."""


def _ours(mixer: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: TokenSetTransformer(
        IN_DIM, 2, DIM, DEPTH, HEADS, mixer=mixer, positions="none", num_representatives=SUMMARIES, **options
    )


MODELS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "cbsa": ("CBSA", _ours("cbsa")),
    "free": ("CBSA, free step", _ours("cbsa", step="free")),
    "certified": ("CBSA, certified step", _ours("cbsa", step="certified")),
    "agent": ("agent attention", _ours("agent", qkv="shared")),
    "gated": ("gated attention MIL (Ilse et al. 2018)", lambda: GatedAttentionMIL(IN_DIM, 2, DIM)),
    "mean": ("mean pooling", lambda: MeanPooling(IN_DIM, 2, DIM)),
    "nystrom": (
        "Nyström attention, 2 layers",
        lambda: NystromAggregator(IN_DIM, 2, DIM, DEPTH, HEADS, num_landmarks=SUMMARIES),
    ),
}
"""By name: a title, and what builds it."""
RESULTS = Path("benchmarks/results/bags_of_digits.json")
DOCS = Path("docs/results/small_models.md")
MARKERS = ("<!-- bags of digits: begin -->", "<!-- bags of digits: end -->")


@dataclass
class Options:
    """Train models of sets on bags of digits."""

    models: tuple[str, ...] = tuple(MODELS)
    seeds: tuple[int, ...] = (0, 1, 2)
    bags: tuple[int, int, int] = (400, 150, 400)
    """Training, validation and test bags; the same for every seed."""
    epochs: int = 12
    batch_size: int = 8
    lr: float = 1e-3
    """Peak learning rate of AdamW, after a warm-up of one epoch; then half a cosine."""
    threads: int = 1


class Bags(NamedTuple):
    """Bags as index lists into the images of a split."""

    images: Tensor
    """``(images, 64)`` float32."""
    rows: list[Tensor]
    coords: list[Tensor]
    labels: Tensor

    def batch(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features, coordinates, mask and labels of some bags, padded to the longest."""
        rows = [self.rows[i] for i in chosen.tolist()]
        features = nn.utils.rnn.pad_sequence([self.images[row] for row in rows], batch_first=True)
        coords = nn.utils.rnn.pad_sequence([self.coords[i] for i in chosen.tolist()], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(features.shape[1]) < lengths[:, None]
        return features, coords, mask, self.labels[chosen]


def make_bags(pixels: np.ndarray, digits: np.ndarray, count: int, seed: int) -> Bags:
    """Bags of the images of a split."""
    generator = torch.Generator().manual_seed(seed)
    nines = torch.from_numpy(np.flatnonzero(digits == NINE))
    others = torch.from_numpy(np.flatnonzero(digits != NINE))
    low, high = map(math.log, SIZES)
    rows, coords = [], []
    for i in range(count):
        size = round(math.exp(low + (high - low) * torch.rand((), generator=generator).item()))
        row = others[torch.randint(len(others), (size,), generator=generator)]
        if i % 2:
            held = max(1, round(SHARE * size))
            places = torch.randperm(size, generator=generator)[:held]
            row[places] = nines[torch.randint(len(nines), (held,), generator=generator)]
        rows.append(row)
        coords.append(torch.rand(size, 2, generator=generator))
    images = torch.from_numpy(pixels).flatten(1).float()
    return Bags(images, rows, coords, torch.arange(count) % 2)


def open_bags(counts: tuple[int, int, int]) -> dict[str, Bags]:
    """Bags of the three splits, pixels standardised by the training images."""
    splits, _ = open_digits("L")
    bags = {
        name: make_bags(splits[name].pixels, splits[name].labels, count, seed)
        for seed, (name, count) in enumerate(zip(("train", "val", "test"), counts, strict=True))
    }
    mean, std = bags["train"].images.mean(), bags["train"].images.std()
    return {name: part._replace(images=(part.images - mean) / std) for name, part in bags.items()}


def _call(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    features, coords, mask, _ = batch
    logits: Tensor = model(features, coords=coords, token_mask=mask)
    return logits


def _chunks(order: Tensor, size: int) -> Iterator[Tensor]:
    yield from order.split(size)


@torch.no_grad()
def measure_auc(model: nn.Module, bags: Bags) -> float:
    """The area under the ROC curve; bags of like size go together."""
    model.eval()
    order = torch.tensor([len(row) for row in bags.rows]).argsort()
    scores = torch.empty(len(order))
    for chosen in _chunks(order, 32):
        scores[chosen] = _call(model, bags.batch(chosen)).softmax(-1)[:, 1]
    return binary_auroc(scores, bags.labels).item()


def train(build: Callable[[], nn.Module], bags: dict[str, Bags], options: Options, seed: int) -> dict[str, Any]:
    """Train one model, keep its best epoch, test it."""
    torch.manual_seed(seed)
    model = build()
    steps = options.epochs * math.ceil(len(bags["train"].rows) / options.batch_size)
    warm = steps // options.epochs
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, (1 + math.cos(math.pi * max(i - warm, 0) / max(steps - warm, 1))) / 2),
    )
    best, kept, start = -1.0, copy.deepcopy(model.state_dict()), time.perf_counter()
    for _ in range(options.epochs):
        model.train()
        for chosen in _chunks(torch.randperm(len(bags["train"].rows)), options.batch_size):
            batch = bags["train"].batch(chosen)
            loss = F.cross_entropy(_call(model, batch), batch[3])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        score = measure_auc(model, bags["val"])
        if score > best:
            best, kept = score, copy.deepcopy(model.state_dict())
    seconds = time.perf_counter() - start
    model.load_state_dict(kept)
    return {"seed": seed, "val_auc": best, "test_auc": measure_auc(model, bags["test"]), "seconds": seconds}


def measure(options: Options) -> dict[str, Any]:
    """Train and test all models with all seeds."""
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        raise SystemExit(f"no model {unknown[0]!r}; there are {', '.join(MODELS)}")
    torch.set_num_threads(options.threads)
    bags = open_bags(options.bags)
    rows = []
    for name in options.models:
        title, build = MODELS[name]
        runs = []
        for seed in options.seeds:
            runs.append(train(build, bags, options, seed))
            print(
                f"{name}, seed {seed}: test AUC {runs[-1]['test_auc']:.4f}, {runs[-1]['seconds']:.0f} s",
                flush=True,
            )
        values = [run["test_auc"] for run in runs]
        rows.append(
            {
                "model": name,
                "title": title,
                "parameters": sum(p.numel() for p in build().parameters()),
                "mean": statistics.mean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else None,
                "runs": runs,
            }
        )
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(options).items()}
    return {
        "date": datetime.date.today().isoformat(),
        "environment": environment(),
        "options": given,
        "rows": rows,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    spread = "" if row["sd"] is None else f" ± {row['sd']:.3f}"
    return [row["title"], f"{row['mean']:.3f}{spread}", f"{row['parameters']:,}"]


def write_docs(record: dict[str, Any]) -> None:
    """Put the table between its markers in the docs."""
    before, rest = DOCS.read_text(encoding="utf-8").split(MARKERS[0])
    lines = ["| model | test AUC | parameters |", "|---|---|---|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in record["rows"]]
    table = "\n".join([MARKERS[0], "", *lines, "", MARKERS[1]])
    DOCS.write_text(before + table + rest.split(MARKERS[1])[1], encoding="utf-8")


def main() -> None:
    options = tyro.cli(Options)
    record = measure(options)
    table = Table("model", "test AUC", "parameters")
    for row in record["rows"]:
        table.add_row(*_cells(row))
    Console().print(table)
    if options == Options():
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(record, indent=2) + "\n")
        write_docs(record)
        print(f"results: {RESULTS}, table: {DOCS}")


if __name__ == "__main__":
    main()
