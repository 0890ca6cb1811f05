"""A recovery with a teacher in two processes (gloo), copied or sharded, is that in one."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from cbsa_torch.train.config import dump_yaml
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.adaptation.stages import recover
from tests.helpers.runs import measured

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def launch(config, folder):
    """What two processes say."""
    path = folder / "adapt.yaml"
    path.write_text(dump_yaml(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    result = subprocess.run(
        [*launcher, "-m", "cbsa_torch.cli", "adapt", "--config", str(path)],
        capture_output=True, text=True, check=False, timeout=55, env=ENVIRONMENT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "sharded"])
def test_two_processes_recover_like_one(config, tmp_path, sharded):
    config.distill.features, config.engine.threads, config.optim.epochs = 2.0, 1, 2
    # Adam would divide small gradients by themselves, and with them their rounding
    config.optim.name, config.optim.lr, config.new_lr = "sgd", 0.05, None
    alone = dataclasses.replace(config, output=str(tmp_path / "alone"))
    recover(alone)
    config.engine = dataclasses.replace(config.engine, fsdp=sharded)
    assert ("sharded" in launch(config, tmp_path)) == sharded
    kept = [load_file(RunFolder(run.output).weights) for run in (config, alone)]
    torch.testing.assert_close(*kept, rtol=1e-4, atol=1e-5)
    for run in (config, alone):  # goes on in one process
        run.engine = dataclasses.replace(run.engine, fsdp=False)
        run.optim = dataclasses.replace(run.optim, epochs=3)
        run.accept_changes = True
        recover(run)
    first, second = measured(config), measured(alone)
    assert len(first) == len(second) == 3
    for one, other in zip(first, second, strict=True):
        assert one["val_top1"] == other["val_top1"]
        for key in ("train_loss", "val_loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)
