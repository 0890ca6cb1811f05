"""Slides made of real digits: a model that is told which slides hold nines finds where the nines are.

    pip install 'cbsa-torch[slides]'
    python examples/slides.py [--folder runs/slides_of_digits]

A slide is a lattice of 150 to 300 tiles, scattered over two pieces of tissue; the features of a tile are the 64
pixels of a digit. In every second slide a small region holds nines, elsewhere there are none. Slides are
written as TRIDENT writes them, with labels in a table; the model is trained on labels of slides alone. It
prints AUC and balanced accuracy on the test slides, and writes a map of attention of one of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import tyro
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from cbsa_torch.cli import main as cbsa
from cbsa_torch.train import evaluate_checkpoint, load_config, train
from cbsa_torch.train.tasks.slides.config import SlidesTrainConfig

NINE = 9
TILE = 512
"""Side of a tile in pixels of the slide."""
SIDE = 24
"""Of the lattice, in tiles."""
REGION = 4.0
"""Radius of the region of nines, in tiles."""


@dataclass
class Options:
    """Train on slides made of digits, and see where the model looks."""

    folder: Path = Path("runs/slides_of_digits")
    slides: int = 120
    epochs: int = 20
    seed: int = 0


def tissue(generator: np.random.Generator) -> np.ndarray:
    """Places ``(N, 2)`` on the lattice: two round pieces."""
    lattice = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE), indexing="ij"), -1).reshape(-1, 2)
    centres = generator.uniform(6, SIDE - 6, (2, 2))
    nearest = np.min([np.linalg.norm(lattice - centre, axis=1) for centre in centres], axis=0)
    return lattice[np.argsort(nearest, kind="stable")[: generator.integers(150, 301)]]


def write_slide(path: Path, generator: np.random.Generator, *, positive: bool) -> np.ndarray:
    """One file of features and coordinates; which tiles hold nines."""
    digits = load_digits()
    places = tissue(generator)
    middle = places[generator.integers(len(places))]
    inside = (np.linalg.norm(places - middle, axis=1) <= REGION) & positive
    nines, others = (np.flatnonzero(mask) for mask in (digits.target == NINE, digits.target != NINE))
    rows = np.where(inside, generator.choice(nines, len(places)), generator.choice(others, len(places)))
    with h5py.File(path, "w") as file:
        file["features"] = (digits.data[rows] / 16).astype(np.float32)
        file["coords"] = TILE * places
        file["coords"].attrs["patch_size_level0"] = TILE
    return inside


def main() -> None:
    """Write slides, train, evaluate, draw a map."""
    options = tyro.cli(Options, description=__doc__)
    data = options.folder / "features"
    data.mkdir(parents=True, exist_ok=True)
    generator, table, nines = np.random.default_rng(options.seed), ["slide,label"], {}
    for number in range(options.slides):
        name, positive = f"s{number:03}", number % 2 == 1
        nines[name] = write_slide(data / f"{name}.h5", generator, positive=positive)
        table.append(f"{name},{'nines' if positive else 'none'}")
    (data / "slides.csv").write_text("\n".join(table) + "\n")

    recipe = load_config("slides", SlidesTrainConfig.task)
    args = {"dim": 48, "depth": 2, "num_heads": 3, "num_representatives": 16}
    config = replace(
        recipe,
        output=str(options.folder / "run"),
        seed=options.seed,
        overwrite=True,
        model=replace(recipe.model, name="token_set_cbt_tiny", args=args),
        data=replace(recipe.data, root=str(data)),
        optim=replace(recipe.optim, lr=3e-3, epochs=options.epochs, warmup_epochs=2, keep="last"),
        engine=replace(recipe.engine, tracker="none", threads=1, accumulate=1),  # 8 slides packed in a pass
    )
    train(config)
    result = evaluate_checkpoint(config.output)
    print(f"test slides: AUC {result.auc:.3f}, balanced accuracy {result.balanced_accuracy:.3f}")
    shown = [name for name, inside in nines.items() if inside.any()][:10]
    maps = options.folder / "maps"
    files = [str(data / f"{name}.h5") for name in shown]
    cbsa(["predict", "--checkpoint", config.output, *files, "--maps", str(maps)])
    found = []
    for name in shown:
        attention = np.loadtxt(maps / f"{name}_map.csv", delimiter=",", skiprows=1)[:, -1]
        found.append(roc_auc_score(nines[name], attention))
    print(
        f"attention tells tiles with nines from others: AUC {np.mean(found):.2f} (mean of {len(shown)} slides)"
    )
    print(f"where it looks: {maps}/{shown[0]}_map.png")


if __name__ == "__main__":
    main()
