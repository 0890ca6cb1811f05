"""The paper's ImageNet recipe, end to end in two processes, on a generated folder of ImageNet's shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from cbsa_torch.train.data import read_skipped
from cbsa_torch.train.registry import load_config
from tests.helpers.imagenet_folder import CLASSES, write_imagenet_folder


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*launcher, "-m", "cbsa_torch.cli", *command],
        capture_output=True, text=True, check=False, timeout=240, env=environment,
    )  # fmt: skip


def test_the_recipe_is_the_papers():
    """Appendix C: 150 epochs, Lion, lr 2e-4, wd 0.05, batch 256, warm-up 20, then cosine; crop and flip only."""
    config = load_config("imagenet")
    optim, data = config.optim, config.data
    assert (optim.name, optim.lr, optim.weight_decay, optim.batch_size) == ("lion", 2e-4, 0.05, 256)
    assert (optim.epochs, optim.warmup_epochs, optim.min_lr, optim.label_smoothing) == (150, 20, 0, 0.1)
    assert (data.crop_scale, data.hflip) == ((0.08, 1.0), 0.5)
    assert (data.color_jitter, data.auto_augment, data.rotate, data.shift) == (0.0, None, 0.0, 0.0)
    assert (optim.ema_decay, optim.clip_grad) == (None, None)


def test_the_recipe_trains_and_evaluates_in_two_processes(tmp_path: Path):
    root, run = tmp_path / "imagenet", tmp_path / "run"
    write_imagenet_folder(root)
    broken = root / "val" / "n01440764" / "broken.JPEG"
    broken.write_bytes(b"\xff\xd8\xff")
    result = launch(
        "train", "--config", "imagenet", "--data.root", str(root), "--output", str(run),
        "--optim.epochs", "2", "--optim.warmup-epochs", "1", "--optim.batch-size", "12", "--data.workers", "1",
        "--engine.threads", "1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    config = load_config(run / "config.yaml")
    assert (config.model.name, config.model.image_size) == ("cbt_tiny_patch16_224", None)
    assert "folder: 36 training and 16 validation images, 3 classes" in result.stdout
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6)]
    (line,) = read_skipped(run / "skipped_images.txt")
    assert line.startswith(f"{broken}\t")
    result = launch("eval", "--checkpoint", str(run), "--split", "val", "--batch-size", "4")
    assert result.returncode == 0, result.stderr
    record = json.loads((run / "eval_val.json").read_text())
    assert (record["images"], record["class_names"]) == (15, list(CLASSES))
    assert len(record["skipped_images"]) == 1
    assert record["top1"] == max(row["val_top1"] for row in rows)


def test_too_many_unreadable_images_stop_every_process(tmp_path: Path):
    """Each process meets some of them; together they are one more than the limit."""
    root, run = tmp_path / "images", tmp_path / "run"
    write_imagenet_folder(root, train=6)
    for path in sorted((root / "train").rglob("*.JPEG"))[::4]:
        path.write_bytes(path.read_bytes()[:200])
    result = launch(
        "train", "--config", "folder", "--data.root", str(root), "--output", str(run), "--engine.threads", "1",
        "--optim.epochs", "9", "--optim.batch-size", "6", "--data.workers", "1", "--data.max-bad-images", "4",
    )  # fmt: skip
    assert result.returncode != 0
    assert "data.max_bad_images is 4" in result.stderr
    assert len(read_skipped(run / "skipped_images.txt")) in (5, 6)  # both processes may list theirs at once
