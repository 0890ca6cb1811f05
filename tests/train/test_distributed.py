"""Two processes on the CPU (gloo) count what one counts."""

import json
import os
import subprocess
import sys

OPTIONS = ["--optim.epochs", "1", "--optim.warmup-epochs", "0", "--engine.threads", "1", "--optim.lr", "1e-3"]
MODEL = ["--model.args", "embed_dim", "16", "depth", "1", "num_heads", "2"]


def launch(processes, *command):
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--standalone",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*launcher, "-m", "cbsa_torch.cli", *command],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip


def test_two_processes_train_and_count_every_image_once(tmp_path):
    run = tmp_path / "run"
    result = launch(2, "train", "--output", str(run), *OPTIONS, *MODEL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch   1/1") == 1  # one process speaks
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1]
    result = launch(
        2, "eval", "--checkpoint", str(run), "--batch-size", "50", "--output", str(tmp_path / "two.json")
    )
    assert result.returncode == 0, result.stderr
    alone = subprocess.run(
        [sys.executable, "-m", "cbsa_torch.cli", "eval", "--checkpoint", str(run), "--output", str(tmp_path / "one.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    two, one = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("two", "one"))
    assert two["images"] == one["images"] == 360
    assert two["confusion"] == one["confusion"]
    assert two["top1"] == one["top1"]
    assert abs(two["loss"] - one["loss"]) < 1e-5
