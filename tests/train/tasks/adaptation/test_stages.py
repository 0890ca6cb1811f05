"""Recovery as a whole: what is trained, from what, and that it goes on where it was stopped."""

import copy
from pathlib import Path

import pytest
import torch

from cbsa_torch.models import load_checkpoint
from cbsa_torch.train import evaluate_checkpoint, losses
from cbsa_torch.train.config import OptimConfig
from cbsa_torch.train.engine.optim import make_optimizer, make_scheduler
from cbsa_torch.train.errors import ConfigError, RunFolderError
from cbsa_torch.train.evaluate import open_trained
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.adaptation.stages import recover, stages
from tests.helpers.runs import assert_refused, assert_same_run, elsewhere, interrupt_training, last


def weights(folder):
    return load_checkpoint(RunFolder(folder).weights)[0].state_dict()


def test_a_run_is_opened_and_goes_on_exactly(config, tmp_path):
    config.engine.save_steps = 2
    result = recover(config)
    trained = open_trained(result.folder)
    assert trained.info["model_args"]["mixer"] == "adapted_cbsa"
    measured_again = evaluate_checkpoint(result.folder, split="val", output=tmp_path / "e.json")
    assert measured_again.top1 == result.best_score
    cut = elsewhere(config, tmp_path / "cut")
    interrupt_training(cut, 4, recover)
    assert last(cut)["progress"]["batch"] == 2
    recover(cut)
    assert_same_run(cut, config)


def test_a_step_in_parts_with_a_teacher_is_the_step_in_one(config, tmp_path):
    config.optim.name, config.optim.lr, config.new_lr = "sgd", 0.05, None
    config.distill.features, config.optim.batch_size, config.optim.epochs = 5.0, 1257, 2  # all of the images
    recover(config)
    parts = copy.deepcopy(config)
    parts.output, parts.engine.accumulate = str(tmp_path / "parts"), 3
    recover(parts)
    torch.testing.assert_close(last(config)["model"], last(parts)["model"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tune", ["attention", "new"])
def test_the_rest_stays_as_it_was(config, vit, tune):
    config.tune = tune
    recover(config)
    before, after = weights(vit), last(config)["model"]
    changed = {
        name for name, value in after.items() if name not in before or not torch.equal(value, before[name])
    }
    inherited = {name for name in changed if name in before}
    assert all(".attn." in name for name in changed)
    assert bool(inherited) == (tune == "attention")
    assert any("step" in name for name in changed)


def test_an_accepted_change_of_the_new_rate_is_kept(config):
    recover(config)
    config.new_lr, config.optim.epochs, config.accept_changes = 3e-3, 2, True
    recover(config)
    groups = last(config)["optimizer"]["param_groups"]
    assert sorted({group.get("lr_scale", 1.0) for group in groups}) == pytest.approx([1.0, 3.0])


def test_layer_by_layer_from_the_last(config, vit, monkeypatch):
    config.output += "/"
    runs = stages(config, 1)
    assert [run.model.layers for run in runs] == ["2", "1,2", "0,1,2"]
    folder = Path(config.output)
    beside = folder.with_name(f"{folder.name}_stages")
    assert [Path(run.output) for run in runs] == [beside / "1", beside / "2", folder]
    assert {run.distill.teacher for run in runs} == {str(vit)}
    result = recover(config, stage_epochs=1)
    assert open_trained(result.folder).info["model_args"]["layers"] == [0, 1, 2]
    monkeypatch.setattr(losses, "mean_loss", lambda *_: pytest.fail("a finished stage was trained again"))
    assert recover(config, stage_epochs=1) == result


def test_an_adapted_run_gets_more_layers(config, tmp_path):
    config.model.layers = "latter_half"
    first = recover(config)
    more = copy.deepcopy(config)
    more.output, more.model.layers, more.model.original = str(tmp_path / "more"), "all", str(first.folder)
    assert open_trained(recover(more).folder).info["model_args"]["layers"] == [0, 1, 2]
    more.output, more.model.mixer, more.model.args = str(tmp_path / "other"), "linear", {}
    assert_refused(more, ConfigError, "it is adapted already, to 'adapted_cbsa'", recover)


def test_the_rate_of_what_is_new():
    model = torch.nn.Linear(3, 2)
    model.step = torch.nn.Parameter(torch.ones(2, 1))
    config = OptimConfig(name="adamw", lr=1e-3, warmup_lr=1e-4, epochs=4, warmup_epochs=1, weight_decay=0.1)
    optimizer = make_optimizer(model, config, {"step": 10.0})
    scheduler = make_scheduler(optimizer, config, 5)
    own = next(group for group in optimizer.param_groups if group["params"][0] is model.step)
    assert own["weight_decay"] == 0
    assert [g["weight_decay"] for g in optimizer.param_groups if model.weight in set(g["params"])] == [0.1]
    rates = []
    for step in range(20):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
        assert own["lr"] == pytest.approx(10 * rates[-1])
    assert rates[0] < rates[5] > rates[-1] > 0


BAD = {
    "unknown": ({"model.original": "vit_tinny"}, "model.original: 'vit_tinny'"),
    "none": ({"model.original": None}, "model.original must name"),
    "layers": ({"model.layers": "x,1"}, "model.layers must be"),
    "far": ({"model.layers": "7"}, "layers must hold indices"),
    "negative": ({"distill.logits": -1.0}, "distill.logits must not be negative"),
    "nothing": ({"distill.labels": 0.0, "distill.logits": 0.0, "distill.features": 0.0}, "distill must weigh"),
    "init_from": ({"model.init_from": "x"}, "model.init_from must be left out"),
    "compile": ({"engine.compile": True}, "engine.compile must be off"),
    "mssa": ({"model.mixer": "mssa", "model.args": {}, "tune": "new"}, "tune 'new' leaves nothing"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_settings_are_named_before_anything_is_written(config, changes, message):
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        setattr(getattr(config, section) if section else config, name, value)
    assert_refused(config, ConfigError, message, recover)


def test_an_original_within_the_output_and_stages_of_no_epoch(config, vit):
    with pytest.raises(ConfigError, match="stage_epochs must be at least 1"):
        recover(config, 0)
    config.output = str(vit)
    with pytest.raises(RunFolderError, match=r"model\.original .* lies in output"):
        recover(config)
