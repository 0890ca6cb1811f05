"""Training as a whole: what is written, what a step is, and what stops a run."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import resource
from pathlib import Path

import pytest
import torch

from cbsa_torch import cli
from cbsa_torch.interpret.pages.report import best_epoch
from cbsa_torch.models import load_checkpoint
from cbsa_torch.train import evaluate_checkpoint, load_config, train, trainer
from cbsa_torch.train.config import ModelConfig, dump_yaml
from cbsa_torch.train.errors import ConfigError, DataError, NonFiniteLossError
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks import classification
from tests.helpers import processes
from tests.helpers.colour_folder import digits_config, plain_vit
from tests.helpers.runs import (
    STEPS,
    assert_refused,
    assert_same_run,
    assert_same_tensors,
    contents,
    during_training_step,
    elsewhere,
    interrupt_training,
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


def test_a_run_learns_the_colours_and_leaves_its_configuration(finished):
    config, result = finished
    assert result.best_score >= 0.9
    assert evaluate_checkpoint(result.folder).top1 >= 0.9
    assert load_config(RunFolder(result.folder).config) == config
    assert not list(Path(result.folder).rglob("*.tmp"))


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


def test_of_equal_scores_the_smallest_loss_is_the_best(config, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    task = classification.Classification
    original = task.evaluate

    def evaluate(*args, **kwargs):
        return original(*args, **kwargs)._replace(top1=0.5, loss=next(losses))

    monkeypatch.setattr(task, "evaluate", evaluate)
    config.optim.epochs = 3
    assert train(config).best_epoch == 2
    assert load_checkpoint(RunFolder(config.output).weights)[1]["epoch"] == 2
    assert best_epoch(rows(config), "val_top1") == (2, 0.5)
    assert last(config)["progress"]["best_loss"] == 1.0


def test_the_same_seed_gives_the_same_run(config, whole, tmp_path):
    train(config)
    assert_same_tensors(last(config)["model"], last(whole)["model"])
    other = dataclasses.replace(config, output=str(tmp_path / "other"), seed=1)
    train(other)
    assert measured(other) != measured(config)


@pytest.mark.parametrize("vit", [False, True])
def test_the_embedded_digits_train(tmp_path, vit):
    """By a model of this package, or by a vision transformer of timm."""
    config = digits_config(tmp_path / "run")
    if vit:
        arguments = {"embed_dim": 32, "depth": 1, "num_heads": 2, "in_chans": 1, "patch_size": 4}
        config.model = ModelConfig("vit_tiny_patch16_224", image_size=8, args=arguments)
    train(config)
    result = evaluate_checkpoint(config.output)
    assert result.images == 360
    assert 0 <= result.top1 <= result.top5 <= 1
    assert load_checkpoint(RunFolder(config.output).weights)[1]["input"]["input_size"] == [1, 8, 8]


def test_an_image_size_other_than_the_design_trains(config):
    config.model.image_size = 20
    train(config)
    assert evaluate_checkpoint(config.output).images == 12


# ---- steps and optimisers


def test_the_average_is_what_is_evaluated_and_kept(config):
    config.optim.ema_decay, config.optim.epochs = 0.9, 1
    train(config)
    state = last(config)
    best, _ = load_checkpoint(RunFolder(config.output).weights)
    assert_same_tensors(best.state_dict(), state["ema"])
    assert not torch.equal(state["ema"]["head.weight"], state["model"]["head.weight"])


@pytest.mark.parametrize("batch_size", [10, 24])
def test_a_batch_size_need_not_divide_the_data(config, batch_size):
    config.optim.batch_size = batch_size
    train(config)
    per_epoch = 24 // batch_size  # whole batches
    assert [row["step"] for row in rows(config)] == [per_epoch, 2 * per_epoch]
    result = evaluate_checkpoint(config.output, batch_size=7)
    assert result.images == sum(map(sum, result.confusion)) == 12


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(config):
    config.optim.batch_size = 64
    assert_refused(config, (ConfigError, DataError), r"optim\.batch_size")


def in_parts(config, tmp_path, batch_size, accumulate):
    other = elsewhere(config, tmp_path / "parts")
    other.optim.batch_size, other.engine.accumulate = batch_size, accumulate
    return other


def assert_same_steps(one, other):
    assert [row["step"] for row in rows(one)] == [row["step"] for row in rows(other)]
    for first, second in zip(rows(one), rows(other), strict=True):
        assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-4)
    torch.testing.assert_close(last(one)["model"], last(other)["model"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("torn", "clip_grad"), [(False, None), (True, None), (True, 0.01)])
def test_a_step_in_parts_is_the_step_in_one(config, images, tmp_path, torn, clip_grad):
    """Every image weighs the same, when some cannot be read, too."""
    plain_vit(config)
    config.optim.clip_grad = clip_grad
    for path in (images / "train" / "red").iterdir() if torn else ():
        path.write_bytes(b"torn")
    split = in_parts(config, tmp_path, 8, 4)
    train(config)
    train(split)
    assert_same_steps(config, split)


def test_a_last_step_of_fewer_parts_is_a_step_of_a_smaller_batch(config, images, tmp_path):
    plain_vit(config)
    for folder in (images / "train").iterdir():
        for path in sorted(folder.iterdir())[4:]:
            path.unlink()  # 12 images are left: one part of two, or a whole batch of 12
    split = in_parts(config, tmp_path, 24, 2)
    config.optim.batch_size = 12
    train(config)
    train(split)
    assert [row["step"] for row in rows(config)] == [1, 2]
    assert_same_steps(config, split)


def test_a_run_stopped_within_an_epoch_of_accumulated_steps_goes_on_exactly(config, tmp_path):
    plain_vit(config)
    config.optim.name, config.engine.accumulate, config.engine.save_steps = "adamw", 4, 1
    config.model.args["drop_path_rate"] = 0.2
    train(config)
    cut = elsewhere(config, tmp_path / "cut")
    interrupt_training(cut, 4 * STEPS + 4 + 2)  # in epoch 2, the second step: between its parts
    assert last(cut)["progress"]["batch"] == 4
    assert states(cut)[0].name == f"step_{STEPS + 1:010d}.state"
    train(cut)
    assert_same_run(cut, config)


def test_an_unfinished_accumulation_at_the_end_of_an_epoch_is_one_step(config):
    config.optim.batch_size, config.engine.accumulate = 16, 2
    train(config)
    assert [row["step"] for row in rows(config)] == [2, 4]


def test_the_learning_rate_warms_up_and_falls(config):
    config.optim.epochs, config.optim.warmup_epochs, config.optim.min_lr = 4, 2, 1e-5
    train(config)
    rates = [row["lr"] for row in rows(config)]
    assert rates[0] < rates[1] > rates[2] > rates[3] > 1e-5
    assert max(rates) <= config.optim.lr


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_gradient_of_a_step_is_clipped_to_its_norm(config, tmp_path, accumulate):
    """Of one step from the same weights, the two lengths of the gradient differ as the limits do."""
    plain_vit(config)
    config.optim = dataclasses.replace(config.optim, name="momentum", lr=1.0, weight_decay=0.0, batch_size=24)
    config.optim.epochs, config.optim.clip_grad, config.engine.accumulate = 1, 0.01, accumulate
    other = elsewhere(config, tmp_path / "other")
    other.optim.clip_grad = 0.03
    train(config)
    train(other)
    assert rows(config)[0]["step"] == 1
    first, second = last(config)["model"], last(other)["model"]
    assert sum((first[name] - second[name]).square().sum() for name in first).sqrt() == pytest.approx(
        0.02, rel=1e-2
    )


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


def test_a_nan_loss_stops_and_the_run_goes_on_from_the_last_good_epoch(config, whole, monkeypatch):
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
    monkeypatch.undo()
    train(dataclasses.replace(config, resume=True))
    assert measured(config) == measured(whole)


def test_a_nan_loss_in_the_first_epoch_says_that_there_is_no_checkpoint(config, monkeypatch):
    during_training_step(monkeypatch, 1, lambda loss, logits: loss * float("nan"))
    with pytest.raises(NonFiniteLossError, match="epoch 1, batch 1; there is no training state yet"):
        train(config)
    assert not states(config)


def test_a_far_too_large_learning_rate_stops(config):
    config.optim.lr = 1e20
    with pytest.raises(NonFiniteLossError, match=r"the loss became (nan|inf)"):
        train(config)


def spoil_the_gradient(loss, logits):
    return loss + (logits * 0).sum().abs().sqrt()  # adds zero, with gradient nan


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_weights_spoiled_by_a_gradient_are_not_kept(config, monkeypatch, tmp_path, clip_grad):
    config.engine.save_steps, config.engine.keep_states = 1, 1
    config.optim.clip_grad = clip_grad
    whole = elsewhere(config, tmp_path / "whole")
    train(whole)
    with monkeypatch.context() as patch:
        during_training_step(patch, STEPS + 2, spoil_the_gradient)
        expected = r"by step 5 \(.*\): the loss was finite, its gradient was not; .* epoch 1 and 1 batches"
        with pytest.raises(NonFiniteLossError, match=expected):
            train(config)
    assert [path.name for path in states(config)] == [f"step_{STEPS + 1:010d}.state"]
    assert all(value.isfinite().all() for value in last(config)["model"].values())
    train(config)
    assert_same_run(config, whole)


def test_weights_spoiled_by_the_last_step_are_not_evaluated(config, monkeypatch):
    config.optim.epochs = 1
    during_training_step(monkeypatch, STEPS, spoil_the_gradient)
    with pytest.raises(NonFiniteLossError, match=f"by step {STEPS} .* there is no training state yet"):
        train(config)
    assert rows(config) == []


@pytest.mark.parametrize(
    ("split", "said"), [("train", "no training image of epoch 1"), ("val", "validation split")]
)
def test_data_of_which_nothing_can_be_read_stop_the_run(config, images: Path, split, said):
    config.data.max_bad_images = 1000
    for path in (images / split).rglob("*.png"):
        path.write_bytes(b"torn")
    with pytest.raises(DataError, match=rf"{said} could be read; they are listed in .*skipped_images\.txt"):
        train(config)
    assert rows(config) == []
    assert not states(config)


# ---- a disk that is full or read-only


def train_on_a_full_disk(args, from_epoch):
    """The ``main`` of a process that finds its disk full in one epoch."""
    run_epoch = trainer._run_epoch

    def patched(session, progress):
        if progress.epoch == from_epoch:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))  # files grow no further than 1 kB
        run_epoch(session, progress)

    trainer._run_epoch = patched
    return cli.main(args)


@pytest.mark.parametrize("from_epoch", [0, 1])
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(config, whole, tmp_path, from_epoch):
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    main = functools.partial(train_on_a_full_disk, from_epoch=from_epoch)
    result = processes.run(1, "train", "--config", str(tmp_path / "run.yaml"), main=main)
    assert result.returncode == 1
    assert "File too large" in result.stderr
    kept = "there is no training state yet" if from_epoch == 0 else "the last training state is that of epoch 1"
    assert kept in result.stderr
    assert str(RunFolder(config.output).path) in result.stderr
    assert len(states(config)) == from_epoch
    assert not list(Path(config.output).rglob("*.tmp"))
    if from_epoch:
        load_checkpoint(RunFolder(config.output).weights)
    train(config)
    assert_same_run(config, whole)


def test_a_read_only_folder_is_named_before_anything_is_trained(config, monkeypatch):
    def refuse(path, *args, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(trainer, "train_one_epoch", lambda *args, **options: pytest.fail("trained"))
    with pytest.raises(OSError, match=f"Read-only file system.*{config.output}"):
        train(config)
