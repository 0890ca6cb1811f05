from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from cbsa_torch.models import load_checkpoint
from cbsa_torch.train import evaluate_checkpoint, load_config, predict_images, train
from cbsa_torch.train.config import ModelConfig, OptimConfig
from cbsa_torch.train.engine.optim import make_optimizer
from cbsa_torch.train.errors import ConfigError, DataError, NonFiniteLossError, RunFolderError
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks import classification
from tests.helpers.runs import (
    STEPS,
    assert_same_tensors,
    during_training_step,
    last,
    measured,
    rows,
    states,
)


def falling_accuracy(evaluate):
    """Make every evaluation look worse than the one before."""
    top1 = 1.0

    def patched(*args, **options):
        nonlocal top1
        top1 /= 2
        return evaluate(*args, **options)._replace(top1=top1)

    return patched


# ---- a whole run


def test_a_run_learns_the_colours(finished):
    _, result = finished
    assert result.best_score >= 0.9
    assert evaluate_checkpoint(result.folder).top1 >= 0.9


def test_a_run_folder_holds_the_configuration(finished):
    config, result = finished
    assert load_config(RunFolder(result.folder).config) == config


def test_a_run_folder_describes_the_environment(finished):
    environment = json.loads(RunFolder(finished[1].folder).environment.read_text())
    assert environment["torch"] == torch.__version__
    assert {"date", "cbsa_torch", "commit", "python", "timm", "device"} <= environment.keys()


def test_a_run_folder_holds_one_row_of_metrics_per_epoch(finished):
    config, result = finished
    found = rows(config)
    assert [row["epoch"] for row in found] == list(range(1, config.optim.epochs + 1))
    assert [row["step"] for row in found] == [STEPS * row["epoch"] for row in found]
    assert result.best_score == max(row["val_top1"] for row in found)
    assert found[result.best_epoch - 1]["val_top1"] == result.best_score
    assert found[-1]["train_loss"] < found[0]["train_loss"]
    assert all(math.isfinite(value) for row in found for value in row.values())


def test_a_run_folder_holds_tensorboard_events(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(Path(finished[1].folder) / "tensorboard")).Reload()
    logged = [(e.step, e.value) for e in accumulator.Scalars("val_top1")]
    assert logged == [(row["epoch"], pytest.approx(row["val_top1"])) for row in rows(finished[0])]


def test_the_best_checkpoint_says_what_it_is(finished):
    config, result = finished
    model, info = load_checkpoint(RunFolder(result.folder).weights)
    assert info["model"] == config.model.name
    assert info["class_names"] == ["blue", "green", "red"]
    assert (info["epoch"], info["val_top1"]) == (result.best_epoch, result.best_score)
    assert info["input"]["input_size"] == [3, 32, 32]
    assert model.num_classes == 3


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_best_or_the_last_weights_are_kept(config, monkeypatch, keep):
    task = classification.Classification
    monkeypatch.setattr(task, "evaluate", falling_accuracy(task.evaluate))
    config.optim.keep = keep
    assert train(config).best_epoch == 1
    model, info = load_checkpoint(RunFolder(config.output).weights)
    assert info["epoch"] == {"best": 1, "last": 2}[keep]
    assert (keep == "last") == torch.equal(model.head.weight, last(config)["model"]["head.weight"])


def test_no_temporary_files_are_left(finished):
    assert not [p for p in Path(finished[1].folder).rglob("*") if p.name.endswith(".tmp")]


def test_the_same_seed_gives_the_same_run(config, tmp_path):
    train(config)
    again = dataclasses.replace(config, output=str(tmp_path / "again"))
    train(again)
    assert_same_tensors(last(config)["model"], last(again)["model"])
    other = dataclasses.replace(config, output=str(tmp_path / "other"), seed=1)
    train(other)
    assert measured(other) != measured(config)


def test_the_embedded_digits_train(digits_config):
    train(digits_config)
    result = evaluate_checkpoint(digits_config.output)
    assert result.images == 360
    assert 0 <= result.top1 <= result.top5 <= 1


def test_a_vision_transformer_of_timm_trains_through_the_same_path(digits_config):
    arguments = {"embed_dim": "32", "depth": "1", "num_heads": "2", "in_chans": "1", "patch_size": "4"}
    digits_config.model = ModelConfig("vit_tiny_patch16_224", image_size=8, args=arguments)
    train(digits_config)
    assert evaluate_checkpoint(digits_config.output).images == 360
    assert load_checkpoint(RunFolder(digits_config.output).weights)[1]["input"]["input_size"] == [1, 8, 8]


def test_an_image_size_other_than_the_design_trains(config):
    config.model.image_size = 20
    train(config)
    assert evaluate_checkpoint(config.output).images == 12


def test_images_of_different_sizes_train(config, images):
    for i, size in enumerate([(50, 20), (9, 70), (1, 1)]):
        Image.new("RGB", size, (200, 60, 40)).save(images / "train" / "red" / f"odd_{i}.png")
    train(config)


# ---- steps and optimisers


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_optimisers_and_averaging_train(config, name, ema_decay):
    config.optim.name, config.optim.ema_decay = name, ema_decay
    train(config)
    state = last(config)
    assert (state["ema"] is None) == (ema_decay is None)
    assert evaluate_checkpoint(config.output).images == 12


def test_the_average_is_what_is_evaluated_and_kept(config):
    config.optim.ema_decay, config.optim.epochs = 0.9, 1
    train(config)
    state = last(config)
    best, _ = load_checkpoint(RunFolder(config.output).weights)
    assert_same_tensors(best.state_dict(), state["ema"])
    assert not torch.equal(state["ema"]["head.weight"], state["model"]["head.weight"])


@pytest.mark.parametrize("batch_size", [10, 16, 23, 24])
def test_a_batch_size_need_not_divide_the_data(config, batch_size):
    config.optim.batch_size = batch_size
    train(config)
    per_epoch = rows(config)[0]["step"]
    assert per_epoch in (24 // batch_size, -(-24 // batch_size))
    assert rows(config)[1]["step"] == 2 * per_epoch
    result = evaluate_checkpoint(config.output, batch_size=7)
    assert result.images == sum(map(sum, result.confusion)) == 12


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(config):
    config.optim.batch_size = 64
    with pytest.raises((ConfigError, DataError), match=r"optim\.batch_size"):
        train(config)
    assert not Path(config.output).exists()


def test_accumulated_gradients_equal_those_of_one_batch(config, tmp_path):
    # no batch norm, no random crops: the two runs see the same images in the same batches
    arguments = {"embed_dim": "16", "depth": "1", "num_heads": "2", "patch_size": "16"}
    config.model = ModelConfig("vit_tiny_patch16_224", image_size=32, args=arguments)
    config.data.crop_scale, config.data.crop_ratio, config.data.hflip = (1.0, 1.0), (1.0, 1.0), 0.0
    config.optim.name, config.optim.lr = "sgd", 0.1
    split = copy.deepcopy(config)
    split.output, split.engine.accumulate = str(tmp_path / "split"), 4
    train(config)
    train(split)
    assert [row["step"] for row in rows(split)] == [row["step"] for row in rows(config)]
    assert rows(split)[0]["train_loss"] == pytest.approx(rows(config)[0]["train_loss"], rel=1e-4)
    for name, tensor in last(config)["model"].items():
        torch.testing.assert_close(last(split)["model"][name], tensor, atol=1e-5, rtol=1e-4)


def test_an_unfinished_accumulation_at_the_end_of_an_epoch_is_one_step(config):
    config.optim.batch_size, config.engine.accumulate = 16, 2
    train(config)
    assert [row["step"] for row in rows(config)] == [2, 4]


def test_the_batch_must_divide_among_accumulation_steps(config):
    config.engine.accumulate = 3
    with pytest.raises(ConfigError, match=r"batch_size \(8\) must be divisible .* \(1 x 3\)"):
        train(config)


def test_the_learning_rate_warms_up_and_falls(config):
    config.optim.epochs, config.optim.warmup_epochs, config.optim.min_lr = 4, 2, 1e-5
    train(config)
    rates = [row["lr"] for row in rows(config)]
    assert rates[0] < rates[1] > rates[2] > rates[3] > 1e-5
    assert max(rates) <= config.optim.lr


def test_gradient_clipping_trains(config):
    config.optim.clip_grad = 0.1
    train(config)


def test_an_unknown_optimiser_names_the_nearest(config):
    config.optim.name = "adamww"
    with pytest.raises(ConfigError, match=r"'adamww'; did you mean 'adamw"):
        train(config)


def test_an_unknown_model_names_the_nearest(config):
    config.model.name = "cbt_nano_patch4_23"
    with pytest.raises(ConfigError, match="did you mean 'cbt_nano_patch4_"):
        train(config)


def test_wrong_model_arguments_are_refused(config):
    config.model.args = {"embed_dmi": "16"}
    with pytest.raises(ConfigError, match=r"cannot build cbt_nano_patch4_32 with .*embed_dmi"):
        train(config)


def test_precision_may_differ_from_that_of_an_earlier_run_in_the_process(config, finished):
    config.engine.precision = "bf16"
    train(config)
    assert rows(config)[-1]["step"] == 2 * STEPS


def test_a_compiled_model_is_saved_like_any_other(config, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    config.engine.compile = True
    train(config)
    assert evaluate_checkpoint(config.output).images == 12
    train(dataclasses.replace(config, resume=True))


# ---- losses that are not numbers


def test_a_nan_loss_stops_and_leaves_the_states_of_the_last_good_epoch(config, monkeypatch, contents):
    kept = {}

    def spoil(loss, logits):
        kept.update(contents(Path(config.output)))
        return loss * float("nan")

    during_training_step(monkeypatch, STEPS + 2, spoil)
    with pytest.raises(
        NonFiniteLossError, match=r"nan in epoch 2, batch 2; the last training state is that of epoch 1"
    ):
        train(config)
    after = contents(Path(config.output))
    for name in ("states/step_0000000003.state", "model.safetensors", "metrics.jsonl"):
        assert after[name] == kept[name]


def test_a_nan_loss_in_the_first_epoch_says_that_there_is_no_checkpoint(config, monkeypatch):
    during_training_step(monkeypatch, 1, lambda loss, logits: loss * float("nan"))
    with pytest.raises(NonFiniteLossError, match="epoch 1, batch 1; there is no training state yet"):
        train(config)
    assert not states(config)


def test_a_far_too_large_learning_rate_stops(config):
    config.optim.lr = 1e20
    with pytest.raises(NonFiniteLossError, match=r"the loss became (nan|inf)"):
        train(config)


def test_weights_spoiled_by_the_last_step_of_an_epoch_are_not_kept(config, monkeypatch, contents):
    kept = {}

    def spoil_the_gradient(loss, logits):
        kept.update(contents(Path(config.output)))
        return loss + (logits * 0).sum().abs().sqrt()  # adds zero, with gradient nan

    during_training_step(monkeypatch, 2 * STEPS, spoil_the_gradient)
    with pytest.raises(NonFiniteLossError):
        train(config)
    name = "states/step_0000000003.state"
    assert contents(Path(config.output))[name] == kept[name]


def test_a_run_goes_on_after_a_nan_loss(config, monkeypatch):
    with monkeypatch.context() as patch:
        during_training_step(patch, STEPS + 2, lambda loss, logits: loss * float("nan"))
        with pytest.raises(NonFiniteLossError):
            train(config)
    train(dataclasses.replace(config, resume=True))
    assert [row["epoch"] for row in rows(config)] == [1, 2]


# ---- output folders


def test_an_existing_run_is_refused_and_left_untouched(config, contents):
    train(config)
    before = contents(Path(config.output))
    config.optim.epochs = 3
    with pytest.raises(RunFolderError, match=r"of another configuration:\n  optim.epochs: 2 -> 3\ncontinue it"):
        train(config)
    assert contents(Path(config.output)) == before


def test_overwrite_replaces_a_run(config):
    train(config)
    stale = Path(config.output) / "report.html"
    stale.write_text("old")
    config.overwrite, config.optim.epochs = True, 1
    train(config)
    assert not stale.exists()
    assert len(rows(config)) == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_not_a_run_is_refused(config, overwrite, contents):
    folder = Path(config.output)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    config.overwrite = overwrite
    with pytest.raises(RunFolderError, match="holds files that are not a run"):
        train(config)
    assert contents(folder) == {"thesis.txt": b"years of work"}


def test_a_folder_with_a_foreign_config_file_is_not_a_run(config, contents):
    folder = Path(config.output)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    (folder / "config.yaml").write_text("theme: dark\n")
    config.overwrite = True
    with pytest.raises(RunFolderError, match="not a run"):
        train(config)
    assert "thesis.txt" in contents(folder)


def test_an_empty_folder_may_be_used(config):
    Path(config.output).mkdir()
    train(config)


def test_a_file_as_output_is_refused(config):
    Path(config.output).write_text("")
    with pytest.raises(RunFolderError, match="is not a folder"):
        train(config)


def test_there_must_be_something_to_resume(config):
    config.resume = True
    with pytest.raises(RunFolderError, match="nothing to resume"):
        train(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optim", "name", "nonsense"),
        ("optim", "batch_size", 0),
        ("model", "name", "nonsense"),
        ("model", "args", {"depth": "0"}),
        ("model", "init_from", "nowhere.safetensors"),
        ("data", "root", "nowhere"),
        ("data", "name", "torch/nonsense"),
    ],
)
def test_what_cannot_work_is_refused_before_a_run_is_overwritten(config, contents, section, key, value):
    train(config)
    before = contents(Path(config.output))
    config.overwrite = True
    setattr(getattr(config, section), key, value)
    with pytest.raises((ConfigError, DataError, FileNotFoundError)):
        train(config)
    assert contents(Path(config.output)) == before


# ---- fine-tuning


@pytest.mark.parametrize("source", ["folder", "file"])
def test_fine_tuning_with_other_classes_and_size(finished, config, images, source, tmp_path):
    shutil.rmtree(images)
    for split in ("train", "val", "test"):
        for name, value in (("dark", 30), ("light", 220)):
            (images / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = np.full((32, 32, 3), value + i, dtype=np.uint8)
                Image.fromarray(pixels).save(images / split / name / f"{i}.png")
    start = finished[1].folder
    config.model = ModelConfig(
        "cbt_nano_patch4_32",
        image_size=24,
        init_from=str(start if source == "folder" else RunFolder(start).weights),
    )
    train(config)
    model, info = load_checkpoint(RunFolder(config.output).weights)
    assert (model.num_classes, info["input"]["input_size"]) == (2, [3, 24, 24])
    assert model.pos_embed.shape[1] == 1 + 6 * 6
    assert evaluate_checkpoint(config.output).images == 16
    (prediction,) = predict_images(config.output, [images / "test" / "dark" / "0.png"])
    assert sorted(prediction.classes) == ["dark", "light"]
    train(dataclasses.replace(config, resume=True))


def test_fine_tuning_starts_from_the_given_weights(finished, config):
    config.model = ModelConfig("cbt_nano_patch4_32", init_from=str(finished[1].folder))
    config.optim.lr, config.optim.epochs = 1e-6, 1
    assert train(config).best_score == finished[1].best_score


def test_fine_tuning_another_model_is_refused(finished, config):
    config.model = ModelConfig("cbt_nano_patch4_64", init_from=str(finished[1].folder))
    with pytest.raises(
        ConfigError, match=r"holds 'cbt_nano_patch4_32', but model\.name is 'cbt_nano_patch4_64'"
    ):
        train(config)


def test_fine_tuning_cannot_change_the_architecture(finished, config):
    config.model.init_from = str(finished[1].folder)
    with pytest.raises(ConfigError, match=r"model\.args cannot be changed together with model\.init_from"):
        train(config)


def test_fine_tuning_from_nothing_is_refused(config, tmp_path):
    config.model = ModelConfig("cbt_nano_patch4_32", init_from=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="none"):
        train(config)


@pytest.mark.parametrize("everything", [False, True])
def test_weight_decay_of_matrices_only_or_of_everything(everything):
    model = timm.create_model("cbt_pico_patch1_8", embed_dim=16, depth=1, num_heads=2)
    optimizer = make_optimizer(model, OptimConfig(name="adamw", weight_decay=0.1, decay_everything=everything))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        assert (id(parameter) in decayed) == (everything or matrix), name
