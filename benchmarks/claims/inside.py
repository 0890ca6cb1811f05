"""Block 4: class-token maps against masks that exist: emoji's outlines, CamVid's classes (Tables 5 and 6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.claims import street_maps
from benchmarks.claims.runs import Folders, Measured, Run
from cbsa_torch import interpret
from cbsa_torch.train import TrainConfig, evaluate_checkpoint, load_config, train
from cbsa_torch.train.data.fetch import load
from cbsa_torch.train.evaluate import open_trained
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.base import Trained

SIZE = "nano_patch4_64"
SEEDS = (0, 1, 2)
EPOCHS = 12
OPAQUE = 127
"""Alpha above which a pixel belongs to the drawing."""
REPEATED = ("Flags", "Symbols")
"""Categories whose outlines repeat between the splits, and are left out."""
DISC = 30
"""Radius in pixels of a centred disc that ignores the image, the baseline to beat."""


class Form(NamedTuple):
    """A member of the family."""

    family: str
    args: Mapping[str, Any] = {}
    minutes: float = 8


FORMS = {
    "cbt": Form("cbt"),
    "crate": Form("crate", minutes=12),
    "crate_cbt": Form("crate_cbt", minutes=10),
    "tost": Form("tost"),
    "certified": Form("cbt", {"step": "certified"}, minutes=10),
}


def runs(folders: Folders) -> list[Run]:
    """Each member on emoji with each seed; the adapted ViTs on street scenes."""
    emoji = [
        Run(
            f"inside_emoji_{form}_seed{seed}",
            FORMS[form].minutes,
            partial(train_form, folders, form, seed),
            seed,
        )
        for seed in SEEDS
        for form in FORMS
    ]
    return [*emoji, *street_maps.runs(folders)]


def configuration(folders: Folders, name: str, form: str, seed: int) -> TrainConfig:
    """The recipe of emoji64, shorter, with another model and seed."""
    recipe = load_config("emoji64")
    assert isinstance(recipe, TrainConfig)
    root = recipe.data.root if folders.emoji is None else str(folders.emoji)
    member = FORMS[form]
    return replace(
        recipe,
        output=str(folders.runs / name),
        seed=seed,
        model=replace(recipe.model, name=f"{member.family}_{SIZE}", args=dict(member.args)),
        data=replace(recipe.data, root=root),
        optim=replace(recipe.optim, epochs=EPOCHS, warmup_epochs=1, keep="last"),
        engine=replace(recipe.engine, threads=1, tracker="none"),
    )


def train_form(folders: Folders, form: str, seed: int) -> Measured:
    """Train on the categories, test, and compare class-token maps with the outlines."""
    config = configuration(folders, f"inside_emoji_{form}_seed{seed}", form, seed)
    train(config)
    test = evaluate_checkpoint(config.output, split="test")
    trained = open_trained(config.output)
    values = {
        "form": form,
        "model": config.model.name,
        "model_args": dict(config.model.args),
        "epochs": EPOCHS,
        "test_top1": test.top1,
        "test_images": test.images,
        "zero_shot": zero_shot(trained, config.data.root),
        "disc": disc_iou(trained, config.data.root),
    }
    return Measured(values, RunFolder(config.output).metrics)


def zero_shot(trained: Trained, root: str | None) -> dict[str, Any]:
    """IoU with regions of test images: of the head that is best on validation, and of every layer's best."""
    val, test = (
        interpret.zero_shot_iou(trained.model, emoji_pairs(trained, root, split)) for split in ("val", "test")
    )
    chosen = {}
    for region, layers in val.per_head.items():
        candidates = [
            (value, layer, head) for layer, row in enumerate(layers) for head, value in enumerate(row)
        ]
        _, layer, head = max(candidates)
        chosen[region] = {"layer": layer, "head": head, "iou": test.per_head[region][layer][head]}
    return {
        "images": test.images,
        "val_images": val.images,
        "chosen": chosen,
        "best": test.best,
        "heads": test.heads,
    }


def emoji_pairs(trained: Trained, root: str | None, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of a split as the model is fed, and which pixels belong to the drawing."""
    arrays = load("emoji64", root)
    names = [str(name) for name in arrays["category_names"]]
    dataset: Any = trained.task.open_split(trained.spec.mode, trained.class_names, split).dataset
    images, labels = trained.task.sample(dataset, trained.spec, len(dataset))
    part = arrays["split"] == list(arrays["split_names"]).index(split)
    masks = np.concatenate([arrays[vendor][part][..., 3] > OPAQUE for vendor in ("google", "twitter")])
    for image, label, mask in zip(images, labels, masks, strict=True):
        if names[label] not in REPEATED:
            yield image, torch.from_numpy(mask)


def disc_iou(trained: Trained, root: str | None) -> float:
    """Foreground IoU of a centred disc, on test images."""
    values = []
    for _, mask in emoji_pairs(trained, root, "test"):
        rows, columns = (torch.arange(side) - (side - 1) / 2 for side in mask.shape)
        disc = rows[:, None].square() + columns.square() <= DISC**2
        values.append(((disc & mask).sum() / (disc | mask).sum()).item())
    return fmean(values)
