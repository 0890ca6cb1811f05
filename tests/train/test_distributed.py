"""Several processes on the CPU (gloo) compute what one computes, sharded or not, stopped or not."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from cbsa_torch.models import load_checkpoint
from cbsa_torch.train import load_config, train
from cbsa_torch.train.config import dump_yaml
from cbsa_torch.train.run.folder import RunFolder
from tests.helpers.runs import assert_same_tensors, last, measured, rows, states

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def command(processes, *args):
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--nproc_per_node", str(processes), "--standalone", "-m"]
    return [*launcher, "cbsa_torch.cli", *args]


def launch(processes, *args):
    return subprocess.run(
        command(processes, *args), capture_output=True, text=True, check=False, timeout=120, env=ENVIRONMENT
    )


def launch_training(processes, config, *args):
    path = RunFolder(config.output).path.with_suffix(".yaml")
    path.write_text(dump_yaml(config))
    result = launch(processes, "train", "--config", str(path), *args)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("moment", ["setup", "backward", "interrupt"])
def test_the_others_end_when_one_process_fails_alone(digits, tmp_path, moment):
    """In a bounded time, without an abort, though they wait for it in an exchange."""
    digits.data.workers, digits.optim.epochs = 1, 500
    (tmp_path / "run.yaml").write_text(dump_yaml(digits))
    arguments = [*command(2, "train", "--config", str(tmp_path / "run.yaml"))]
    arguments[arguments.index("cbsa_torch.cli") : arguments.index("train")] = ["tests.helpers.failing", moment]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=40, env=ENVIRONMENT)
    assert result.returncode == 1
    assert f"exitcode: {130 if moment == 'interrupt' else 1}) local_rank: 1" in result.stderr
    assert ("only here" in result.stderr) == (moment != "interrupt")
    assert "terminate called" not in result.stderr


@pytest.fixture
def digits(digits_config):
    """Two epochs of eight steps on augmented digits; the stem has batch normalisation."""
    digits_config.optim.batch_size, digits_config.optim.epochs = 150, 2
    digits_config.engine.threads = 1
    return digits_config


@pytest.fixture
def alone(digits, tmp_path):
    """The same run in one process, which the others must agree with."""
    config = dataclasses.replace(digits, output=str(tmp_path / "alone"))
    train(config)
    model = load_checkpoint(RunFolder(config.output).weights)[0]
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    return config


def assert_same_curve(one, other, rel=1e-6):
    assert len(rows(one)) == len(rows(other)) > 0
    for first, second in zip(measured(one), measured(other), strict=True):
        assert first["val_top1"] == second["val_top1"]
        for key in ("epoch", "step", "lr"):
            assert first[key] == second[key]
        for key in ("train_loss", "val_loss"):
            assert first[key] == pytest.approx(second[key], rel=rel)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_train_and_evaluate_like_one(digits, alone, tmp_path, processes):
    result = launch_training(processes, digits)
    assert result.stdout.count("epoch   1/2") == 1  # one process speaks
    assert_same_curve(digits, alone)
    torch.testing.assert_close(last(digits)["model"], last(alone)["model"], rtol=1e-4, atol=1e-5)
    # 360 test images in batches of 50, which neither 2 nor 3 processes share out evenly
    several, one = tmp_path / "several.json", tmp_path / "one.json"
    for count, output in ((processes, several), (1, one)):
        result = launch(
            count, "eval", "--checkpoint", digits.output, "--batch-size", "50", "--output", str(output)
        )
        assert result.returncode == 0, result.stderr
    first, second = (json.loads(path.read_text()) for path in (several, one))
    assert first["images"] == second["images"] == 360
    assert first["confusion"] == second["confusion"]
    assert (first["top1"], first["top5"]) == (second["top1"], second["top5"])
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)


def test_sharded_training_equals_copies_and_goes_on_in_one_process(digits, alone):
    digits.engine.fsdp, digits.optim.epochs = True, 2
    result = launch_training(2, digits)
    assert "sharded" in result.stdout
    assert_same_curve(digits, alone)
    weights = load_checkpoint(RunFolder(digits.output).weights)[0].state_dict()
    torch.testing.assert_close(
        weights, load_checkpoint(RunFolder(alone.output).weights)[0].state_dict(), rtol=1e-4, atol=1e-5
    )
    for config in (digits, alone):
        further = load_config(RunFolder(config.output).config)
        further.accept_changes, further.engine.fsdp, further.optim.epochs = True, False, 3
        train(further)
    assert_same_curve(digits, alone)


def test_the_average_of_two_processes_is_that_of_one(digits, tmp_path):
    digits.optim.ema_decay, digits.optim.epochs = 0.9, 1
    alone = dataclasses.replace(digits, output=str(tmp_path / "alone"))
    train(alone)
    launch_training(2, digits)
    assert_same_curve(digits, alone)
    torch.testing.assert_close(last(digits)["ema"], last(alone)["ema"], rtol=1e-4, atol=1e-5)
    moved = last(digits)["model"]["head.weight"] - last(digits)["ema"]["head.weight"]
    assert moved.abs().max() > 1e-4


def test_a_sharded_run_goes_on_exactly_within_an_epoch(digits, tmp_path):
    """Two runs in each of the processes: the second, with copies, does not stay sharded."""
    digits.engine.fsdp, digits.engine.save_steps, digits.engine.keep_states = True, 3, 9
    digits.optim.epochs = 1
    launch_training(2, digits)
    cut = dataclasses.replace(digits, output=str(tmp_path / "cut"))
    shutil.copytree(digits.output, cut.output)
    for path in states(cut)[:-2]:  # keeps those of steps 3 and 6
        path.unlink()
    copies = dataclasses.replace(digits, output=str(tmp_path / "copies"))
    copies.engine = dataclasses.replace(digits.engine, fsdp=False)
    for config in (cut, copies):
        RunFolder(config.output).path.with_suffix(".yaml").write_text(dump_yaml(config))
    arguments = command(2, str(tmp_path / "cut.yaml"), str(tmp_path / "copies.yaml"))
    arguments[arguments.index("cbsa_torch.cli")] = "tests.helpers.in_turn"
    result = subprocess.run(
        arguments, capture_output=True, text=True, check=False, timeout=100, env=ENVIRONMENT
    )
    assert result.returncode == 0, result.stderr
    assert "continuing after epoch 0 of 1, batch 6 of 8" in result.stdout
    assert "each with a copy (DDP)" in result.stdout
    assert measured(cut) == measured(digits)
    assert_same_tensors(last(cut)["model"], last(digits)["model"])
    assert_same_curve(copies, digits)


@pytest.mark.slow
def test_a_compiled_model_trains_in_two_processes(digits, tmp_path):
    digits.optim.epochs, digits.optim.batch_size = 1, 600
    plain = dataclasses.replace(digits, output=str(tmp_path / "plain"))
    plain.engine = dataclasses.replace(digits.engine)
    digits.engine.compile = True
    launch_training(2, digits)
    launch_training(2, plain)
    assert last(digits)["model"].keys() == last(plain)["model"].keys()
    assert_same_curve(digits, plain, rel=1e-4)
    launch_training(2, digits)  # finished already: its state is loaded


def test_mixed_precision_is_the_same_sharded_and_copied(digits, tmp_path):
    digits.engine.precision = "bf16"
    sharded = dataclasses.replace(digits, output=str(tmp_path / "sharded"))
    sharded.engine = dataclasses.replace(digits.engine, fsdp=True)
    launch_training(2, digits)
    launch_training(2, sharded)
    assert_same_curve(digits, sharded, rel=1e-3)


def test_sharding_needs_several_processes(digits):
    digits.engine.fsdp = True
    with pytest.raises(ValueError, match=r"engine\.fsdp needs several processes"):
        train(digits)
    assert not RunFolder(digits.output).path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes_of_which_one_is_stopped_go_on_exactly(digits, tmp_path, number):
    digits.engine.save_steps = 3
    digits.model.args["drop_path_rate"] = "0.2"  # draws differently in every process
    digits.model.name = "vit_tiny_patch16_224"
    digits.model.args |= {"patch_size": "2", "in_chans": "1", "embed_dim": "12", "depth": "2"}
    digits.model.args.pop("num_representatives")
    digits.model.image_size = 8
    whole = dataclasses.replace(digits, output=str(tmp_path / "whole"))
    launch_training(2, whole)
    cut = dataclasses.replace(digits, output=str(tmp_path / "cut"))
    (tmp_path / "cut.yaml").write_text(dump_yaml(cut))
    process = subprocess.Popen(
        command(2, "train", "--config", str(tmp_path / "cut.yaml")),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT,
    )  # fmt: skip
    deadline = time.monotonic() + 50
    while not states(cut):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "cbsa_torch.cli"], capture_output=True, text=True, check=True
    )
    os.kill(int(workers.stdout.split()[-1]), number)
    process.wait(60)
    launch_training(2, cut)
    assert measured(cut) == measured(whole)
    assert_same_tensors(last(cut)["model"], last(whole)["model"])
