"""Block 1: the family trained from scratch on CIFAR-10, each with the learning rate that suits it (Table 4)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import timm
import torch

from benchmarks.claims.runs import Folders, Measured, Run, read
from benchmarks.inside import measure
from cbsa_torch.bench import measure as timing
from cbsa_torch.models.counting import count_model
from cbsa_torch.train import TrainConfig, evaluate_checkpoint, load_config, train
from cbsa_torch.train.evaluate import open_trained
from cbsa_torch.train.run.folder import RunFolder

SIZE = "nano_patch4_32"
RECIPE = "animals28"


class Form(NamedTuple):
    """A member of the family."""

    family: str
    args: Mapping[str, Any] = {}
    title: str = ""


FORMS = {
    "cbt": Form("cbt", {}, "CBSA (CBT)"),
    "cbt_lattice": Form("cbt", {"num_representatives": [8, 8]}, "CBSA, 8 x 8 initial guesses as published"),
    "certified": Form("cbt", {"step": "certified"}, "CBSA, certified step"),
    "learned": Form("cbt", {"representatives": "learned"}, "CBSA, learned initial guesses"),
    "crate": Form("crate", {}, "MSSA (CRATE)"),
    "agent": Form("agent", {}, "Agent"),
    "tost": Form("tost", {}, "TSSA (ToST)"),
    "vit": Form("stem_vit", {}, "MHSA (ViT, same stem)"),
}
RATES = (2.5e-4, 5e-4, 1e-3)
"""Learning rates that every form tries for as long."""
SEEDS = (0, 1, 2)
EPOCHS, TRIAL_EPOCHS = 5, 2
EPOCH_MINUTES = 2.5
MEASURED = 500
"""Test images that rates are measured on."""
TIMED = 64
"""Images at a time whose speed is measured, as in training."""


def runs(folders: Folders) -> list[Run]:
    """Trials of the learning rate, then each form with each seed at the rate that was best on validation."""
    trials = [
        Run(trial(form, rate), TRIAL_EPOCHS * EPOCH_MINUTES, partial(try_rate, folders, form, rate), seed=0)
        for form in FORMS
        for rate in RATES
    ]
    trained = [
        Run(
            f"scratch_{form}_seed{seed}",
            EPOCHS * EPOCH_MINUTES + 2,
            partial(train_form, folders, form, seed),
            seed,
            needs=tuple(trial(form, rate) for rate in RATES),
        )
        for seed in SEEDS
        for form in FORMS
    ]
    return [*trials, *trained, Run("scratch_speed", 3, partial(measure_speed, folders), quiet=True)]


def trial(form: str, rate: float) -> str:
    """The name of the run that tries a learning rate."""
    return f"scratch_{form}_lr{rate:g}"


def configuration(
    folders: Folders, name: str, form: str, *, epochs: int, rate: float, seed: int
) -> TrainConfig:
    """The recipe of a small set of images with another model, learning rate, length and seed."""
    recipe = load_config(RECIPE)
    assert isinstance(recipe, TrainConfig)
    if folders.cifar is None:
        raise SystemExit("--cifar DIR is needed: the folder with train/ and test/ of CIFAR-10")
    member = FORMS[form]
    return replace(
        recipe,
        output=str(folders.runs / name),
        seed=seed,
        model=replace(recipe.model, name=f"{member.family}_{SIZE}", args=dict(member.args)),
        data=replace(recipe.data, name="folder", root=str(folders.cifar), shift=0.0625, val_fraction=0.1),
        optim=replace(recipe.optim, epochs=epochs, warmup_epochs=epochs / 10, lr=rate, keep="last"),
        engine=replace(recipe.engine, threads=1, tracker="none"),
    )


def try_rate(folders: Folders, form: str, rate: float) -> Measured:
    """A short run, judged on the images held out of training."""
    name = trial(form, rate)
    config = configuration(folders, name, form, epochs=TRIAL_EPOCHS, rate=rate, seed=0)
    train(config)
    val = evaluate_checkpoint(config.output, split="val")
    log = RunFolder(config.output).metrics
    return Measured({"form": form, "lr": rate, "epochs": TRIAL_EPOCHS, "val_top1": val.top1}, log)


def best_rate(form: str) -> float:
    """The learning rate of best accuracy on the images held out."""
    return max(RATES, key=lambda rate: read(trial(form, rate))["val_top1"])


def train_form(folders: Folders, form: str, seed: int) -> Measured:
    """Train, test, count and look inside."""
    name = f"scratch_{form}_seed{seed}"
    config = configuration(folders, name, form, epochs=EPOCHS, rate=best_rate(form), seed=seed)
    train(config)
    folder = RunFolder(config.output)
    val, test = (evaluate_checkpoint(config.output, split=split) for split in ("val", "test"))
    trained = open_trained(config.output)
    total = count_model(trained.model, (3, 32, 32)).total
    values = {
        "form": form,
        "model": config.model.name,
        "model_args": dict(config.model.args),
        "lr": config.optim.lr,
        "epochs": EPOCHS,
        "val_top1": val.top1,
        "val_images": val.images,
        "test_top1": test.top1,
        "test_images": test.images,
        "parameters": total.parameters,
        "flops": total.counts.flops,
        "similarities": total.counts.similarities,
        "inside": measure(trained, MEASURED),
    }
    return Measured(values, folder.metrics)


def measure_speed(folders: Folders, repetitions: int = 9, budget: float = 20.0) -> Measured:
    """Images per second of inference and of a training step without optimiser, in turn, on one thread.

    Args:
        folders: the log goes to that of the runs.
        repetitions: of each, at most.
        budget: seconds of timing for each of them.
    """
    images = torch.randn(TIMED, 3, 32, 32)
    models: dict[str, Any] = {
        name: timm.create_model(f"{form.family}_{SIZE}", num_classes=10, **form.args)
        for name, form in FORMS.items()
    }
    rows = []
    for training, function in ((False, timing.forward), (True, timing.step)):
        functions = {name: partial(function, model.train(training), images) for name, model in models.items()}
        times = timing.interleaved(functions, "cpu", repetitions=repetitions, budget=budget)
        for name, seconds in times.items():
            low, median, high = timing.quartiles(seconds)
            rows.append(
                {
                    "form": name,
                    "training": training,
                    "images_per_second": TIMED / median,
                    "quartiles": (1000 * low, 1000 * high),
                    "repetitions": len(seconds),
                }
            )
    log = folders.runs / "scratch_speed.json"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(json.dumps(rows))
    return Measured({"model": SIZE, "batch": TIMED, "rows": rows}, log)
