"""Put the weights and the record of a run into the package.

``timm.create_model(NAME, pretrained=True)`` then finds them.

    make demo
    python scripts/ship_weights.py runs/demo cbt_pico_patch1_8.certified_digits

NAME is one of ``cbsa_torch.models.shipped.SHIPPED``. Its folder gets the weights with their description,
without settings that tell of a machine, the run's curve and environment, and the evaluation on the test split.
"""

from __future__ import annotations

import shutil
import sys

from cbsa_torch.models import load_checkpoint, save_checkpoint
from cbsa_torch.models.shipped import SHIPPED, WEIGHTS
from cbsa_torch.train.evaluate import evaluate_checkpoint
from cbsa_torch.train.hub import published
from cbsa_torch.train.run.folder import RunFolder


def main(run: str, name: str) -> None:
    """Replace the folder of ``name`` in the package by the run's."""
    source, weights = RunFolder(run), SHIPPED[name]
    model, info = load_checkpoint(source.weights)
    shutil.rmtree(weights.folder, ignore_errors=True)
    weights.folder.mkdir(parents=True)
    save_checkpoint(weights.folder / WEIGHTS, model, published(info))
    for record in (source.metrics, source.environment):
        shutil.copy(record, weights.folder)
    print(evaluate_checkpoint(name, output=weights.folder / "eval_test.json").summary())


if __name__ == "__main__":
    main(*sys.argv[1:])
