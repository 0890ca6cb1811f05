"""Teachers that do not fit, data of other classes, the command ``cbsa adapt``, and two processes."""

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from cbsa_torch.cli import main
from cbsa_torch.models import load_checkpoint, save_checkpoint
from cbsa_torch.train.errors import ConfigError, RunFolderError
from cbsa_torch.train.evaluate import open_trained
from cbsa_torch.train.registry import load_config
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.adaptation.stages import recover, stages
from tests.helpers import processes
from tests.helpers.runs import assert_refused, elsewhere, measured
from tests.helpers.small_vit import adapt_config, untrained_like


@pytest.mark.parametrize("args", [{"embed_dim": 24}, {"depth": 2}, {"depth": 4}, {"patch_size": 4}])
def test_a_teacher_of_another_shape_is_named_before_anything_is_written(config, vit, tmp_path, args):
    config.distill.teacher = untrained_like(vit, tmp_path / "teacher.safetensors", **args)
    assert_refused(config, ConfigError, r"distill\.teacher must be built as the original is", recover)


def test_a_teacher_of_another_shape_may_teach_its_logits(config, vit, tmp_path):
    config.distill.teacher = untrained_like(vit, tmp_path / "teacher.safetensors", embed_dim=24)
    config.distill.features = 0.0
    assert recover(config).best_epoch == 1


def test_a_teacher_within_the_output_is_refused(config):
    config.distill.teacher = str(Path(config.output) / "model.safetensors")
    assert_refused(config, RunFolderError, r"distill\.teacher .* lies in output", recover)


def give_other_classes(config, path, classes="ab"):
    """Eight images for each class and split, a whole batch of which is smaller."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val", "test"):
        for name in classes:
            (path / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = torch.randint(0, 256, (8, 8), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(path / split / name / f"{i}.png")
    config.data = dataclasses.replace(config.data, name="folder", root=str(path))
    config.optim.batch_size = 8


def test_other_classes_get_a_head_of_their_own(config, tmp_path):
    give_other_classes(config, tmp_path / "images")
    config.tune = "new"
    with pytest.raises(ConfigError, match=r"distill\.logits needs a teacher of the same classes"):
        recover(config)
    config.distill.logits = 0.0
    before = open_trained(str(config.model.original)).model.state_dict()
    trained = open_trained(recover(config).folder)
    after = trained.model.state_dict()
    assert after["head.weight"].shape == (2, 48)
    changed = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}


def test_a_teacher_of_these_classes_teaches_a_new_head(config, vit, tmp_path):
    give_other_classes(config, tmp_path / "ab")
    config.distill.features = 0.0
    config.distill.teacher = untrained_like(vit, tmp_path / "teacher.safetensors", ["x", "y"])
    assert_refused(config, ConfigError, r"distill\.teacher was trained on others than the data have", recover)
    give_other_classes(config, tmp_path / "xy", "xy")
    assert recover(config).best_epoch == 1


def test_the_head_of_new_classes_is_trained_in_every_stage(config, tmp_path):
    give_other_classes(config, tmp_path / "images")
    config.tune, config.distill.logits = "new", 0.0
    assert [stage.tune_head for stage in stages(config, 1)] == [True] * 3
    recover(config, stage_epochs=1)
    heads = [
        load_checkpoint(RunFolder(folder).weights)[0].get_parameter("head.weight")
        for folder in (f"{config.output}_stages/1", f"{config.output}_stages/2", config.output)
    ]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])
    config.data = dataclasses.replace(config.data, name="digits", root=None)
    assert not any(stage.tune_head for stage in stages(config, 1))


def test_both_heads_of_a_distilled_deit_are_trained(config, tmp_path):
    args = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 1, "num_heads": 2}
    config.model.original = str(tmp_path / "deit.safetensors")
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, **args)
    info = {"model": "deit_tiny_distilled_patch16_224", "model_args": {"num_classes": 3, **args}}
    save_checkpoint(config.model.original, model, info)
    give_other_classes(config, tmp_path / "images")
    config.tune = "new"
    config.distill = dataclasses.replace(config.distill, logits=0.0, features=0.0)
    assert recover(config).best_epoch == 1


def test_stages_are_refused_before_the_first_where_the_last_could_not_be_written(config):
    Path(config.output).mkdir()
    (Path(config.output) / "mine.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="holds files that are not a run"):
        recover(config, stage_epochs=1)
    assert not Path(f"{config.output}_stages").exists()
    resumed = copy.deepcopy(config)
    resumed.resume = True
    with pytest.raises(ConfigError, match="resume is not for stages"):
        recover(resumed, stage_epochs=1)


SHORT = [
    *("--optim.epochs", "1", "--optim.batch-size", "128", "--engine.tracker", "none", "--engine.cpu"),
    *("--model.args", "num_representatives", "4"),
]


def test_the_command(vit, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["adapt", "--model", str(vit), "--output", "all", "--distill.logits", "1", *SHORT]) == 0
    said = capsys.readouterr().out
    assert "3 of 3 attention layers are now 'adapted_cbsa'" in said
    assert load_config(RunFolder("all").config).data == load_config(RunFolder(vit).config).data
    for command in (["eval"], ["report", "--images", "16", "--shown", "1", "--robustness-images", "0"]):
        assert main([command[0], "--checkpoint", "all", *command[1:]]) == 0
    assert "test accuracy" in capsys.readouterr().out
    Image.new("L", (8, 8)).save("one.png")
    assert main(["predict", "one.png", "--checkpoint", "all"]) == 0
    assert "one.png" in capsys.readouterr().out
    assert main(["adapt", "--output", "all", "--resume"]) == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--stage-epochs", "x"], "--stage-epochs must be a whole number, got 'x'"),
        (["--stage-epochs", "0"], "stage_epochs must be at least 1, got 0"),
        (["--config", "digits"], "recipe digits is of the task 'classification', not 'adaptation'"),
        (["--data", "digitts"], "digitts"),
    ],
)
def test_bad_commands(vit, tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert main(["adapt", "--model", str(vit), *SHORT, *args]) == 1
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_cnn_cannot_be_adapted(config, tmp_path):
    args = {"in_chans": 1, "num_classes": 10}
    config.model.original = str(tmp_path / "cnn.safetensors")
    info = {"model": "resnet10t", "model_args": args}
    save_checkpoint(config.model.original, timm.create_model("resnet10t", **args), info)
    assert_refused(config, ConfigError, r"cannot be adapted: .*attention", recover)


def for_processes(vit, folder):
    config = adapt_config(vit, folder / "adapted")
    config.distill.features, config.optim.epochs = 2.0, 2
    # Adam would divide small gradients by themselves, and with them their rounding
    config.optim.name, config.optim.lr, config.new_lr = "sgd", 0.05, None
    return config


@pytest.fixture(scope="module")
def alone(vit, tmp_path_factory):
    """A recovery in one process after two epochs, and after a third one; not to be changed."""
    config = for_processes(vit, tmp_path_factory.mktemp("alone"))
    recover(copy.deepcopy(config))
    further = elsewhere(config, f"{config.output}_further")
    shutil.copytree(config.output, further.output)
    further.optim.epochs, further.accept_changes = 3, True
    recover(further)
    return config, further


@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "sharded"])
def test_two_processes_recover_like_one(vit, alone, tmp_path, sharded):
    config = for_processes(vit, tmp_path)
    config.engine.fsdp = sharded
    assert ("sharded" in processes.train(2, config, "adapt").stdout) == sharded
    kept = [load_file(RunFolder(run.output).weights) for run in (config, alone[0])]
    torch.testing.assert_close(*kept, rtol=1e-4, atol=1e-5)
    config.engine.fsdp, config.optim.epochs, config.accept_changes = False, 3, True
    recover(config)  # goes on in one process
    first, second = measured(config), measured(alone[1])
    assert len(first) == len(second) == 3
    for one, other in zip(first, second, strict=True):
        assert one["val_top1"] == other["val_top1"]
        for key in ("train_loss", "val_loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)
