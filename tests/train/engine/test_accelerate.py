"""Several processes on the CPU (gloo) compute what one computes, sharded or not, stopped or not."""

import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from cbsa_torch import interpret
from cbsa_torch.models import load_checkpoint
from cbsa_torch.train import train
from cbsa_torch.train.config import ModelConfig, dump_yaml
from cbsa_torch.train.engine.accelerate import synchronize_batch_norm
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.run.folder import RunFolder
from tests.helpers import in_turn, processes
from tests.helpers.colour_folder import digits_config
from tests.helpers.runs import assert_same_run, elsewhere, last, measured, rows, states, wait_for_state

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]


@pytest.mark.parametrize(
    "moment", ["backward", *(pytest.param(name, marks=pytest.mark.slow) for name in ("setup", "interrupt"))]
)
def test_the_others_end_when_one_process_fails_alone(digits, tmp_path, moment):
    """In a bounded time, without an abort, though they wait for it in an exchange; by the real torchrun."""
    digits.data.workers, digits.optim.epochs = 1, 500
    (tmp_path / "run.yaml").write_text(dump_yaml(digits))
    command = [*LAUNCHER, "tests.helpers.failing", moment, "train", "--config", str(tmp_path / "run.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert result.returncode == 1
    assert f"exitcode: {130 if moment == 'interrupt' else 1}) local_rank: 1" in result.stderr
    assert ("only here" in result.stderr) == (moment != "interrupt")
    assert "terminate called" not in result.stderr


def two_epochs(folder):
    """Two epochs of eight steps on augmented digits; the stem has batch normalisation."""
    config = digits_config(folder / "run")
    config.optim.batch_size, config.optim.epochs = 150, 2
    return config


@pytest.fixture
def digits(tmp_path):
    return two_epochs(tmp_path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process, which the others must agree with; not to be changed."""
    config = two_epochs(tmp_path_factory.mktemp("alone"))
    train(copy.deepcopy(config))
    model = load_checkpoint(RunFolder(config.output).weights)[0]
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return config


def assert_same_curve(one, other, rel=1e-6):
    assert len(rows(one)) == len(rows(other)) > 0
    for first, second in zip(measured(one), measured(other), strict=True):
        assert first["val_top1"] == second["val_top1"]
        for key in ("epoch", "step", "lr"):
            assert first[key] == second[key]
        for key in ("train_loss", "val_loss"):
            assert first[key] == pytest.approx(second[key], rel=rel)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_train_and_evaluate_like_one(digits, alone, tmp_path, count):
    result = processes.train(count, digits)
    assert result.stdout.count("epoch   1/2") == 1  # one process speaks
    assert_same_curve(digits, alone)
    torch.testing.assert_close(last(digits)["model"], last(alone)["model"], rtol=1e-4, atol=1e-5)
    # 360 test images in batches of 50, which neither 2 nor 3 processes share out evenly
    records = []
    for several in (count, 1):
        output = tmp_path / f"{several}.json"
        arguments = ["--checkpoint", digits.output, "--batch-size", "50", "--output", str(output)]
        result = processes.run(several, "eval", *arguments)
        assert result.returncode == 0, result.stderr
        records.append(json.loads(output.read_text()))
    first, second = records
    assert first["images"] == second["images"] == 360
    assert first["confusion"] == second["confusion"]
    assert (first["top1"], first["top5"]) == (second["top1"], second["top5"])
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)


@pytest.mark.parametrize("fsdp", [False, True], ids=["copies", "sharded"])
def test_processes_that_share_the_rows_of_images_train_like_one(digits, alone, tmp_path, fsdp):
    """And one that goes on with the run, in the middle of an epoch."""
    digits.engine.context_parallel, digits.engine.fsdp = 2, fsdp
    digits.engine.save_steps, digits.engine.keep_states = 3, 9
    processes.train(2, digits)
    assert_same_curve(digits, alone)
    torch.testing.assert_close(last(digits)["model"], last(alone)["model"], rtol=1e-4, atol=1e-5)
    for path in states(digits)[:-1]:  # keeps that of step 3
        path.unlink()
    digits.engine.context_parallel, digits.engine.fsdp, digits.accept_changes = 1, False, True
    train(digits)
    assert_same_curve(digits, alone)


def test_context_parallel_that_cannot_work_is_refused_on_every_process(digits):
    digits.engine.context_parallel = 2
    with pytest.raises(ConfigError, match=r"engine.context_parallel \(2\) must divide .* processes, 1"):
        train(digits)
    digits.model = ModelConfig("crate_tiny_patch16_224", image_size=32)
    path = Path(f"{digits.output}.yaml")
    path.write_text(dump_yaml(digits))
    result = processes.run(2, "train", "--config", str(path))
    assert result.returncode != 0
    assert result.stderr.count("MSSA compares every token with every other; use CBSA") == 2
    assert not Path(digits.output).exists()


def test_sharded_training_equals_copies_and_goes_on_in_one_process(digits, alone, tmp_path):
    digits.engine.fsdp = True
    assert "sharded" in processes.train(2, digits).stdout
    assert_same_curve(digits, alone)
    weights = [load_checkpoint(RunFolder(run.output).weights)[0].state_dict() for run in (digits, alone)]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    other = elsewhere(alone, tmp_path / "alone")
    shutil.copytree(alone.output, other.output)
    for config in (digits, other):
        config.accept_changes, config.engine.fsdp, config.optim.epochs = True, False, 3
        train(config)
    assert_same_curve(digits, other)


def test_the_average_of_two_processes_is_that_of_one(digits, tmp_path):
    digits.optim.ema_decay, digits.optim.epochs = 0.9, 1
    alone = elsewhere(digits, tmp_path / "alone")
    train(alone)
    processes.train(2, digits)
    assert_same_curve(digits, alone)
    torch.testing.assert_close(last(digits)["ema"], last(alone)["ema"], rtol=1e-4, atol=1e-5)
    moved = last(digits)["model"]["head.weight"] - last(digits)["ema"]["head.weight"]
    assert moved.abs().max() > 1e-4


def test_a_sharded_run_goes_on_exactly_within_an_epoch(digits, tmp_path):
    """Two runs in each of the processes: the second, with copies, does not stay sharded."""
    digits.engine.fsdp, digits.engine.save_steps, digits.engine.keep_states = True, 3, 9
    digits.optim.epochs = 1
    processes.train(2, digits)
    cut, copies = elsewhere(digits, tmp_path / "cut"), elsewhere(digits, tmp_path / "copies")
    shutil.copytree(digits.output, cut.output)
    for path in states(cut)[:-2]:  # keeps those of steps 3 and 6
        path.unlink()
    copies.engine.fsdp = False
    paths = [tmp_path / "cut.yaml", tmp_path / "copies.yaml"]
    for config, path in zip((cut, copies), paths, strict=True):
        path.write_text(dump_yaml(config))
    result = processes.run(2, *map(str, paths), main=in_turn.main)
    assert result.returncode == 0, result.stderr
    assert "continuing after epoch 0 of 1, batch 6 of 8" in result.stdout
    assert "each with a copy (DDP)" in result.stdout
    assert_same_run(cut, digits)
    assert_same_curve(copies, digits)


@pytest.mark.parametrize("fsdp", [True, False], ids=["sharded", "averaged"])
def test_certified_steps_stay_certified(digits, fsdp):
    """Bases stay orthonormal sharded, averaged, and in one process that goes on with the run."""
    digits.model.args |= {"step": "certified"}
    digits.engine.precision, digits.optim.epochs = "bf16", 1
    if fsdp:
        digits.engine.fsdp = True
        assert "sharded" in processes.train(2, digits).stdout
    else:
        digits.optim.ema_decay = 0.9
        train(digits)
    bases = [bases_with_a_certificate(digits, "model")]
    digits.accept_changes, digits.engine.fsdp, digits.optim.epochs = True, False, 2
    train(digits)
    bases += [bases_with_a_certificate(digits, kind) for kind in (["model"] if fsdp else ["model", "ema"])]
    for first, second in itertools.pairwise(bases):
        assert (first - second).abs().max() > 1e-3


def bases_with_a_certificate(config, kind):
    """The bases of a run's last weights or of their average; they must have a certificate."""
    model = load_checkpoint(RunFolder(config.output).weights)[0].eval()
    model.load_state_dict(last(config)[kind])
    found = interpret.certificate(model, torch.randn(4, 1, 8, 8))
    assert [layer.broken for layer in found.layers] == [None]
    assert found.holding == found.cases == 8
    return model.blocks[0].attn.qkv.weight.detach()


@pytest.mark.slow
@pytest.mark.parametrize("shared", [1, 2], ids=["whole images", "rows shared"])
def test_a_compiled_model_trains_in_two_processes(digits, tmp_path, shared):
    digits.optim.epochs, digits.optim.batch_size = 1, 600
    plain = elsewhere(digits, tmp_path / "plain")
    digits.engine.compile, digits.engine.context_parallel = True, shared
    processes.train(2, digits)
    processes.train(2, plain)
    assert last(digits)["model"].keys() == last(plain)["model"].keys()
    assert_same_curve(digits, plain, rel=1e-4)
    assert "finished already" in processes.train(2, digits).stdout  # its state is loaded


def test_mixed_precision_is_the_same_sharded_and_copied(digits, tmp_path):
    digits.engine.precision = "bf16"
    sharded = elsewhere(digits, tmp_path / "sharded")
    sharded.engine.fsdp = True
    processes.train(2, digits)
    processes.train(2, sharded)
    assert_same_curve(digits, sharded, rel=1e-3)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """A run of two processes that draw differently which paths they drop."""
    config = two_epochs(tmp_path_factory.mktemp("dropping"))
    arguments = {"patch_size": 2, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 2}
    config.model = ModelConfig("vit_tiny_patch16_224", image_size=8, args=arguments | {"drop_path_rate": 0.2})
    config.engine.save_steps = 3
    processes.train(2, config)
    return config


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes_of_which_one_is_stopped_go_on_exactly(dropping, tmp_path, number):
    cut = elsewhere(dropping, tmp_path / "cut")
    (tmp_path / "cut.yaml").write_text(dump_yaml(cut))
    with processes.Command(2, "train", "--config", str(tmp_path / "cut.yaml")) as command:
        wait_for_state(command, cut)
        os.kill(command.pids[1], number)
        assert command.wait(60).returncode in (75, -number)
    assert len(rows(cut)) < 2
    processes.train(2, cut)
    assert_same_run(cut, dropping)


# ---- batch norm over all processes is, in a group of one, torch's and timm's own


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_outputs_and_gradients_in_every_precision(group, kind, dtype):
    own = kind(3)
    other = synchronize_batch_norm(copy.deepcopy(own), torch.device("cpu"))
    assert type(other) is not type(own)
    inputs = [(5 + torch.randn(4, 3, 6, 6)).to(dtype).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    tolerance = {"rtol": 10 * torch.finfo(dtype).eps, "atol": 10 * torch.finfo(dtype).eps}
    weights = torch.randn(4, 3, 6, 6)
    outputs = []
    for norm, x in zip((own, other), inputs, strict=True):
        outputs.append(norm(x))
        (outputs[-1].float() * weights).sum().backward()
    assert outputs[0].dtype == outputs[1].dtype == dtype
    torch.testing.assert_close(*outputs, **tolerance)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)
    for (name, first), second in zip(own.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6, msg=name)  # in float32 always
    torch.testing.assert_close(own.eval()(inputs[0]), other.eval()(inputs[0]))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_activations_of_batch_norms_stay(device):
    model = timm.create_model("efficientnet_b0", num_classes=2).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    converted = synchronize_batch_norm(model, torch.device(device)).eval()
    assert not [m for m in converted.modules() if type(m) in (nn.BatchNorm2d, BatchNormAct2d)]
    torch.testing.assert_close(converted(images), expected)
