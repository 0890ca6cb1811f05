"""Block 2: a pretrained ViT-S/14 that gets attention of linear cost, and recovers (section 4.2, Fig. 9).

The original is the ViT with a linear head for CIFAR-10 on its last class token: a logistic regression on what
the frozen ViT makes of 1,000 training images. Then the forms of attention take the place of its own, in all
layers or in the latter half, and the whole model is trained on the same 1,000 images, from the labels alone
(plain) or with the original as a teacher, too (distilled). So is the original, as long, with its own
attention. Each form has the learning rate that suits it best on images held out, of as many tried for as
long.

There are as many representatives as a quarter of the patches: 16 at 112 x 112, 64 (the paper's number) at 224
x 224. Accuracies are those of the first 200 test images of each class. Weights stay in the folders of the
runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

from benchmarks import adapt_table
from benchmarks.claims.runs import Folders, Measured, Run, read
from benchmarks.claims.vit import NAME
from benchmarks.subset import link_images
from cbsa_torch import interpret
from cbsa_torch.models.adapt.vit import MixerName
from cbsa_torch.models.checkpoint import save_checkpoint
from cbsa_torch.models.counting import count_model
from cbsa_torch.models.hub import open_weights
from cbsa_torch.nn import TokenMixer
from cbsa_torch.train import DataConfig, EngineConfig, ModelConfig, TrainConfig, evaluate_checkpoint
from cbsa_torch.train.build import Built, fit
from cbsa_torch.train.data import input_spec, make_loader, open_splits
from cbsa_torch.train.evaluate import open_trained
from cbsa_torch.train.losses import DistillConfig
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.adaptation.stages import recover
from cbsa_torch.train.tasks.adaptation.task import (
    AdaptedModelConfig,
    AdaptTrainConfig,
    adapt_original,
    open_original,
    paper_optimiser,
)
from cbsa_torch.train.tasks.base import Trained
from cbsa_torch.train.trainer import train

Layers = Literal["all", "latter_half"]


class Form(NamedTuple):
    """A form of attention: the mixer and its options."""

    mixer: MixerName
    args: Mapping[str, Any] = {}
    pools: bool = True
    """Whether it has representatives."""
    title: str = ""


FORMS = {
    "cbsa": Form("adapted_cbsa", {"contraction_step": 1.0}, title="CBSA*, gamma from 1 as published"),
    "linear": Form("linear", pools=False, title="linear"),
    "agent": Form("agent", title="CBSA-vee (agent attention)"),
    "cbsa_from0": Form("adapted_cbsa", title="CBSA*, gamma from 0"),
}
ORIGINAL = "original"
"""The control among them: the attention that it has."""
HALF_FORMS = ("cbsa", "linear", "agent")
"""Those that the latter half of the layers get, too."""
FEW_FORMS = ("cbsa", "linear")
"""Those of the latter half with a teacher, and of larger images: one seed each."""
SIDE, LARGE = 112, 224
"""Sides of the images in pixels."""
PATCH = 14
IMAGES = {"train": 100, "val": 30, "test": 200}
"""Of each class; those for validation follow those for training."""
HEAD_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""Of the head's regularisation, C of scikit-learn; the best of five-fold cross-validation is taken."""
RATES = (5e-5, 1.5e-4, 5e-4)
"""Learning rates that every form tries for as long; the first is the paper's for batches of 512."""
SEEDS = (0, 1, 2)
EPOCHS, TRIAL_EPOCHS, BATCH = 3, 1, 25
LOOKED_AT = 100
"""Test images that coding rates are measured on."""
COSTS = {224: 8, 518: 2, 1022: 1}
"""Sides of the images that are timed, and how many go at a time."""
COST_VARIANTS = ("adapted_cbsa", "adapted_cbsa layers=latter_half", "agent", "linear")


class Recovery(NamedTuple):
    """What is trained."""

    form: str
    layers: Layers = "all"
    distilled: bool = False
    side: int = SIDE

    @property
    def name(self) -> str:
        """Of its runs, but for the seed."""
        kind = "distilled" if self.distilled else "plain"
        return f"adapted_{self.form}_{self.layers}_{kind}_{self.side}"


def runs(folders: Folders) -> list[Run]:
    """Without training, learning rates, recoveries with the first seed, with the others, on larger images."""
    everything = (ORIGINAL, *FORMS)
    first = [Recovery(form) for form in everything]
    distilled = [Recovery(form, distilled=True) for form in FORMS]
    halves = [Recovery(form, "latter_half") for form in HALF_FORMS]
    distilled_halves = [Recovery(form, "latter_half", distilled=True) for form in FEW_FORMS]
    large = [Recovery(form, side=LARGE) for form in FEW_FORMS]
    return [
        *(untrained_run(folders, what) for what in (*first, *halves)),
        *(trial_run(folders, form, rate) for form in everything for rate in RATES),
        *(recovery_run(folders, what, 0) for what in (*first, *distilled, *halves)),
        *(recovery_run(folders, what, seed) for seed in SEEDS[1:] for what in (*first, *distilled, *halves)),
        *(untrained_run(folders, what) for what in (Recovery(ORIGINAL, side=LARGE), *large)),
        *(recovery_run(folders, what, 0) for what in (*large, *distilled_halves)),
        Run("adapted_cost", 10, partial(measure_cost, folders), quiet=True),
    ]


def untrained_run(folders: Folders, what: Recovery) -> Run:
    """Measure the original, or one of its adapted copies, as it is."""
    name = f"adapted_{what.form}_{what.layers}_untrained_{what.side}"
    return Run(name, 1.2 * scale(what), partial(measure_untrained, folders, what, name))


def trial_run(folders: Folders, form: str, rate: float) -> Run:
    """Try a learning rate."""
    return Run(trial(form, rate), 2, partial(try_rate, folders, form, rate), seed=0)


def trial(form: str, rate: float) -> str:
    """The name of the run that tries a learning rate."""
    return f"adapted_{form}_lr{rate:g}"


def recovery_run(folders: Folders, what: Recovery, seed: int) -> Run:
    """Train, test, count and look inside."""
    minutes = (8 if what.distilled else 6.5) * scale(what)
    measure = partial(measure_recovery, folders, what, seed)
    needs = tuple(trial(what.form, rate) for rate in RATES)
    return Run(recovered(what, seed), minutes, measure, seed, needs)


def recovered(what: Recovery, seed: int) -> str:
    """The name of the run that trains it."""
    return f"{what.name}_seed{seed}"


def open_recovered(folders: Folders, what: Recovery, seed: int) -> Trained:
    """What a finished run has trained."""
    name = recovered(what, seed)
    path = folders.runs / read(name)["weights"]
    if not path.exists():
        raise SystemExit(f"{path} is gone: delete the record {name} to train it anew")
    return open_trained(path)


def scale(what: Recovery) -> float:
    """How much longer it takes than on the smaller images."""
    return (what.side / SIDE) ** 2


def data_of(folders: Folders) -> DataConfig:
    """The part of CIFAR-10 that is used, as links."""
    if folders.cifar is None:
        raise SystemExit("--cifar DIR is needed: the folder with train/ and test/ of CIFAR-10")
    subset = folders.runs / "adapted_subset"
    val = slice(IMAGES["train"], IMAGES["train"] + IMAGES["val"])
    for split, source, part in (
        ("train", "train", slice(IMAGES["train"])),
        ("val", "train", val),
        ("test", "test", slice(IMAGES["test"])),
    ):
        link_images(folders.cifar / source, subset / split, part)
    return DataConfig(
        name="folder",
        root=str(subset),
        workers=0,
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        hflip=0.5,
        shift=0.0625,
    )


def original(folders: Folders, side: int) -> Path:
    """The file of the ViT with a head, which is fitted if need be."""
    path = folders.runs / f"adapted_original_{side}.safetensors"
    if not path.exists():
        if folders.vit is None:
            raise SystemExit("--vit FILE is needed: the pretrained ViT, see benchmarks/claims/vit.py")
        fit_head(folders.vit, data_of(folders), side, path)
    return path


@torch.no_grad()
def fit_head(vit: Path, data: DataConfig, side: int, path: Path) -> None:
    """Write the ViT for images of this side with a logistic regression on its frozen features for a head."""
    opened, info = open_weights(vit)
    splits = open_splits(data, "RGB")
    built = fit(Built(opened, info["model_args"]), len(splits.class_names), side)
    model: Any = built.model.eval()
    batches = list(make_loader(splits.train, input_spec(model), data, BATCH, train=False))
    features = torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    search = GridSearchCV(LogisticRegression(max_iter=5000), {"C": HEAD_STRENGTHS})
    search.fit(features.double().numpy(), labels.numpy())
    model.head.weight.copy_(torch.from_numpy(search.best_estimator_.coef_))
    model.head.bias.copy_(torch.from_numpy(search.best_estimator_.intercept_))
    head = {"C": search.best_params_["C"], "cross_validated_top1": search.best_score_}
    told = {"model": info["model"], "model_args": built.args, "class_names": splits.class_names, "head": head}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, model, told)


def adapted_model(folders: Folders, what: Recovery) -> AdaptedModelConfig:
    """What takes the place of the original's attention."""
    form = FORMS[what.form]
    args = dict(form.args)
    if form.pools:
        args["num_representatives"] = (what.side // PATCH // 2) ** 2
    source = str(original(folders, what.side))
    return AdaptedModelConfig(original=source, mixer=form.mixer, layers=what.layers, args=args)


def configuration(
    folders: Folders, what: Recovery, name: str, *, epochs: int, rate: float, seed: int
) -> TrainConfig:
    """Of a training run."""
    common: dict[str, Any] = {
        "output": str(folders.runs / name),
        "seed": seed,
        "data": data_of(folders),
        "optim": replace(
            paper_optimiser(),
            lr=rate,
            batch_size=BATCH,
            epochs=epochs,
            warmup_epochs=epochs / 10,
            keep="last",
        ),
        "engine": EngineConfig(threads=1, tracker="none", keep_states=1),
    }
    if what.form == ORIGINAL:
        source = original(folders, what.side)
        described = open_weights(source)[1]
        return TrainConfig(model=ModelConfig(described["model"], init_from=str(source)), **common)
    distill = DistillConfig(logits=1.0, features=1.0) if what.distilled else DistillConfig()
    return AdaptTrainConfig(model=adapted_model(folders, what), distill=distill, **common)


def open_untrained(folders: Folders, what: Recovery) -> Trained:
    """The original, or one of its adapted copies, as it is."""
    source = original(folders, what.side)
    trained = open_trained(source, data=data_of(folders))
    if what.form == ORIGINAL:
        return trained
    adapted = adapt_original(open_original("model.original", str(source)), adapted_model(folders, what))
    return trained._replace(model=adapted.model.eval())


def measure_untrained(folders: Folders, what: Recovery, name: str) -> Measured:
    """Before anything is trained but the head."""
    trained = open_untrained(folders, what)
    values: dict[str, Any] = {"form": what.form, "layers": what.layers}
    values["weights"] = original(folders, what.side).name
    if what.form == ORIGINAL:
        values["head"] = trained.info["head"]
    else:
        asked = adapted_model(folders, what)
        values |= {"mixer": asked.mixer, "mixer_args": asked.args}
    log = folders.runs / f"{name}.json"
    return Measured({**values, **measured(trained, log)}, log)


def try_rate(folders: Folders, form: str, rate: float) -> Measured:
    """A short run, judged on the images held out of training."""
    config = configuration(folders, Recovery(form), trial(form, rate), epochs=TRIAL_EPOCHS, rate=rate, seed=0)
    folder = trained_folder(config)
    last = folder.read_metrics()[-1]
    values = {"form": form, "lr": rate, "epochs": TRIAL_EPOCHS, "val_top1": last["val_top1"]}
    return Measured(values, folder.metrics)


def best_rate(form: str) -> float:
    """The learning rate of best accuracy on the images held out."""
    return max(RATES, key=lambda rate: read(trial(form, rate))["val_top1"])


def trained_folder(config: TrainConfig) -> RunFolder:
    """Train as configured, or go on with it."""
    result = recover(config) if isinstance(config, AdaptTrainConfig) else train(config)
    return RunFolder(result.folder)


def measure_recovery(folders: Folders, what: Recovery, seed: int) -> Measured:
    """Train, test, count and look inside."""
    name, rate = recovered(what, seed), best_rate(what.form)
    config = configuration(folders, what, name, epochs=EPOCHS, rate=rate, seed=seed)
    folder = trained_folder(config)
    values = {
        "form": what.form,
        "layers": what.layers,
        "recovery": "distilled" if what.distilled else "plain",
        "lr": rate,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "val_top1": folder.read_metrics()[-1]["val_top1"],
        "weights": f"{name}/{folder.weights.name}",
    }
    if isinstance(config, AdaptTrainConfig):
        values |= {"mixer": config.model.mixer, "mixer_args": config.model.args}
    trained = open_trained(folder.path)
    return Measured({**values, **measured(trained, folder.path / "eval_test.json")}, folder.metrics)


def measured(trained: Trained, evaluation: Path) -> dict[str, Any]:
    """Accuracy (its file is given), cost, coding rates at each layer, and the numbers that adaptation added."""
    test = evaluate_checkpoint(trained, batch_size=BATCH, output=evaluation)
    total = count_model(trained.model, trained.spec.input_size).total
    dataset = trained.task.open_split(trained.spec.mode, trained.class_names, "test").dataset
    images, _ = trained.task.sample(dataset, trained.spec, LOOKED_AT)
    rates = interpret.coding_rates(trained.model.eval(), images.split(BATCH))
    return {
        "image_size": trained.spec.input_size[-1],
        "images_of_each_class": IMAGES,
        "test_top1": test.top1,
        "test_images": test.images,
        "parameters": total.parameters,
        "flops": total.counts.flops,
        "similarities": total.counts.similarities,
        "rate": rates.rate,
        "rate_normalized": rates.normalized,
        "rate_images": rates.images,
        "steps": added_steps(trained),
    }


def added_steps(trained: Trained) -> dict[str, list[list[float]]]:
    """Numbers of each head of each adapted layer, by their name."""
    found: dict[str, list[list[float]]] = {}
    for layer in trained.model.modules():
        if isinstance(layer, TokenMixer):
            for name in layer.step_names():
                found.setdefault(name, []).append(layer.get_parameter(name).tolist())
    return found


def measure_cost(folders: Folders, budget: float = 60.0) -> Measured:
    """Images per second, memory, FLOPs and similarities of the original and the forms, on larger images.

    Weights are random, on which cost does not depend. One thread.

    Args:
        folders: the log goes to that of the runs.
        budget: seconds of timing for each of them at each size.
    """
    options = adapt_table.Options(
        NAME, cost_of=NAME, image_sizes=tuple(COSTS), batches=tuple(COSTS.values()), threads=1, budget=budget
    )
    variants = {text: adapt_table.parse_variant(text) for text in COST_VARIANTS}
    rows = adapt_table.costs(options, variants)
    log = folders.runs / "adapted_cost.json"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(json.dumps(rows))
    return Measured({"batches": {str(side): batch for side, batch in COSTS.items()}, "rows": rows}, log)
