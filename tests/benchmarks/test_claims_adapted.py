"""A small ViT of random weights through all kinds of runs of the block that adapts a pretrained one."""

import pytest
import timm
import torch
from benchmarks.claims import adapted, runs
from benchmarks.claims.__main__ import is_chosen
from benchmarks.claims.adapted import Recovery
from benchmarks.claims.runs import Folders, left_of, read, work_through
from benchmarks.claims.vit import NAME
from torch.nn import functional as F

from cbsa_torch.models import load_checkpoint, save_checkpoint
from cbsa_torch.train import evaluate_checkpoint
from cbsa_torch.train.data import open_splits
from cbsa_torch.train.evaluate import open_trained
from tests.helpers.colour_folder import COLOURS, write_split

ARGS = {"img_size": 56, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0, "init_values": 1.0}
PER_CLASS = {"train": 6, "val": 2, "test": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("claims")
    write_split(root / "cifar/train", 10)
    write_split(root / "cifar/test", 5, seed=1)
    torch.manual_seed(0)
    save_checkpoint(
        root / "vit.safetensors", timm.create_model(NAME, **ARGS), {"model": NAME, "model_args": ARGS}
    )
    return Folders(cifar=root / "cifar", vit=root / "vit.safetensors", runs=root / "runs")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"IMAGES": PER_CLASS, "RATES": (1e-5, 1e-4), "EPOCHS": 1, "BATCH": 9}.items():
            patch.setattr(adapted, name, value)
        patch.setattr(runs, "RESULTS", tmp_path_factory.mktemp("records"))
        yield


@pytest.fixture(scope="module")
def done(folders, small):
    """Runs of each kind, done."""
    chosen = [
        *(adapted.untrained_run(folders, Recovery(form)) for form in ("original", "cbsa")),
        *(adapted.trial_run(folders, form, rate) for form in ("original", "cbsa") for rate in adapted.RATES),
        adapted.recovery_run(folders, Recovery("cbsa", "latter_half", distilled=True), 1),
        adapted.recovery_run(folders, Recovery("original"), 0),
    ]
    work_through(chosen, folders.runs / "locks")
    assert left_of(chosen) == []
    return chosen


def test_the_head_is_a_regression_on_frozen_features(folders, done):
    data = adapted.data_of(folders)
    trained = open_trained(adapted.original(folders, 112), data=data)
    vit, _ = load_checkpoint(folders.vit)
    for name, value in vit.state_dict().items():
        if name != "pos_embed":  # resampled for larger images
            torch.testing.assert_close(trained.model.state_dict()[name], value, rtol=0, atol=0)
    images, labels = trained.task.sample(open_splits(data, "RGB").train, trained.spec, 100)
    assert len(labels) == len(COLOURS) * PER_CLASS["train"]
    with torch.no_grad():
        tokens = trained.model.forward_features(images)[:, 0].double()
        errors = trained.model(images).double().softmax(1) - F.one_hot(torch.tensor(labels))
    record = read("adapted_original_all_untrained_112")
    strength = record["head"]["C"]
    weight = trained.model.head.weight.detach().double()
    torch.testing.assert_close(weight, -strength * errors.T @ tokens, rtol=0, atol=5e-3 * strength)
    assert record["test_images"] == len(COLOURS) * PER_CLASS["test"]
    assert record["test_top1"] == 1.0  # even random features tell colours apart


def test_records(folders, done):
    cbsa, control = (read(run.name) for run in done[-2:])
    assert [cbsa[key] for key in ("form", "recovery", "seed")] == ["cbsa", "distilled", 1]
    assert cbsa["mixer_args"] == {"contraction_step": 1.0, "num_representatives": 16}
    assert len(cbsa["steps"]["step_contraction"]) == 1  # one of two layers
    assert control["steps"] == {}
    assert cbsa["parameters"] == control["parameters"] + 4  # two steps, two heads
    assert cbsa["lr"] == adapted.best_rate("cbsa")
    for record in (control, cbsa):
        again = evaluate_checkpoint(folders.runs / record["weights"], output=folders.runs / "again.json")
        assert again.top1 == pytest.approx(record["test_top1"], abs=1e-6)
        assert len(record["rate"]) == 2


def test_what_is_done_is_not_done_again(folders, done, capsys):
    before = {run.name: runs.record_of(run.name).read_bytes() for run in done}
    work_through(done, folders.runs / "locks")
    assert capsys.readouterr().out == ""
    assert before == {run.name: runs.record_of(run.name).read_bytes() for run in done}


def test_the_plan(folders):
    plan = adapted.runs(folders)
    names = [run.name for run in plan]
    assert len(set(names)) == len(names)
    assert {name for run in plan for name in run.needs} <= set(names)
    asked = [run for run in plan if is_chosen(run, "adapted_*")]
    assert [run.name for run in plan if run not in asked] == ["adapted_cost"]  # it wants a quiet machine
    assert [run.name for run in plan if is_chosen(run, "adapted_cost")] == ["adapted_cost"]
    assert sum(run.minutes for run in asked) < 400


def test_cost(folders, small, monkeypatch):
    monkeypatch.setattr(adapted, "COSTS", {28: 2})
    monkeypatch.setattr(adapted, "COST_VARIANTS", ("linear layers=latter_half",))
    rows = adapted.measure_cost(folders, budget=0.1).values["rows"]
    assert [row["name"] for row in rows] == ["original", "linear layers=latter_half"]
    softmax, linear = 6 * 6 * 5**2, 6 * 6 * 5 * 128  # six layers: heads, tokens, tokens or features
    assert [row["similarities"] for row in rows] == [2 * softmax, softmax + linear]
