"""Minutes, without data of yours: noisy lines (Fig. 4), and digits, whose first run the tests repeat."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial

from examples import compress_lines

from benchmarks.claims.runs import Folders, Measured, Run
from benchmarks.inside import measure
from cbsa_torch.train import TrainConfig, evaluate_checkpoint, load_config, train
from cbsa_torch.train.evaluate import open_trained
from cbsa_torch.train.run.folder import RunFolder

DRAWS = (0, 1, 2, 3, 4)
"""Of the points near the lines."""
SEEDS = (0, 1, 2)
EPOCHS = 20
MEASURED = 360
"""Test digits, all there are."""


def runs(folders: Folders) -> list[Run]:
    """Each draw of points, each seed of digits."""
    return [
        *(Run(f"small_lines_seed{seed}", 0.1, partial(compress, folders, seed), seed) for seed in DRAWS),
        *(Run(f"small_digits_seed{seed}", 1, partial(train_digits, folders, seed), seed) for seed in SEEDS),
    ]


def compress(folders: Folders, seed: int) -> Measured:
    """Angles between points and lines, before and after the linear form was iterated."""
    options = compress_lines.Options(seed=seed)
    points, directions = compress_lines.noisy_lines(options)
    states = compress_lines.compress(points, options, [0, options.iterations])
    before, after = (compress_lines.measure(state, directions) for state in states.values())
    log = folders.runs / f"small_lines_seed{seed}.json"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(json.dumps({"before": before, "after": after}))
    asked = {key: value for key, value in asdict(options).items() if key != "output"}
    return Measured({"options": asked, "before": before, "after": after}, log)


def train_digits(folders: Folders, seed: int) -> Measured:
    """A model with certified steps, trained on digits by the recipe of the demo, shorter, and looked into."""
    recipe = load_config("digits")
    assert isinstance(recipe, TrainConfig)
    config = replace(
        recipe,
        output=str(folders.runs / f"small_digits_seed{seed}"),
        seed=seed,
        model=replace(recipe.model, args={"step": "certified"}),
        optim=replace(recipe.optim, epochs=EPOCHS),
        engine=replace(recipe.engine, threads=1, tracker="none"),
    )
    train(config)
    test = evaluate_checkpoint(config.output, split="test")
    values = {
        "model": config.model.name,
        "model_args": config.model.args,
        "epochs": EPOCHS,
        "test_top1": test.top1,
        "test_images": test.images,
        "inside": measure(open_trained(config.output), MEASURED),
    }
    return Measured(values, RunFolder(config.output).metrics)
