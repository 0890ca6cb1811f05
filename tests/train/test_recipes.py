"""The recipes: all can be read, and the paper's for ImageNet trains in two processes on a small folder of its kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cbsa_torch.train.config import check_config, dump_yaml
from cbsa_torch.train.data import read_skipped
from cbsa_torch.train.registry import load_config, read_config, recipe_names
from tests.helpers.imagenet_folder import CLASSES, write_imagenet_folder
from tests.helpers.processes import run


def test_the_recipes_are_those_documented():
    assert recipe_names() == [
        "animals28", "animals28_vit", "digits", "emoji64", "emoji64_vit", "emoji_scenes", "finetune_cifar10",
        "finetune_cifar100", "finetune_flowers102", "finetune_folder", "finetune_pets", "folder", "imagenet", "segmenter_ade20k",
        "slides",
    ]  # fmt: skip


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_pass_the_checks_and_read_back_equal(name):
    config = load_config(name)
    check_config(config)
    assert read_config(yaml.safe_load(dump_yaml(config)), name) == config


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
    root, folder = tmp_path / "imagenet", tmp_path / "run"
    write_imagenet_folder(root)
    broken = root / "val" / "n01440764" / "broken.JPEG"
    broken.write_bytes(b"\xff\xd8\xff")
    result = run(
        2, "train", "--config", "imagenet", "--data.root", str(root), "--output", str(folder),
        "--optim.epochs", "2", "--optim.warmup-epochs", "1", "--optim.batch-size", "12", "--data.workers", "1",
        "--engine.threads", "1", "--model.image-size", "64",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    config = load_config(folder / "config.yaml")
    assert (config.model.name, config.model.image_size) == ("cbt_tiny_patch16_224", 64)
    assert "folder: 36 training and 16 validation images, 3 classes" in result.stdout
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6)]
    (line,) = read_skipped(folder / "skipped_images.txt")
    assert line.startswith(f"{broken}\t")
    result = run(2, "eval", "--checkpoint", str(folder), "--split", "val", "--batch-size", "4")
    assert result.returncode == 0, result.stderr
    record = json.loads((folder / "eval_val.json").read_text())
    assert (record["images"], record["class_names"]) == (15, list(CLASSES))
    assert len(record["skipped_images"]) == 1
    assert record["top1"] == max(row["val_top1"] for row in rows)


def test_too_many_unreadable_images_stop_every_process(tmp_path: Path):
    """Each process meets some of them; together they are one more than the limit."""
    root, folder = tmp_path / "images", tmp_path / "run"
    write_imagenet_folder(root, train=6)
    for path in sorted((root / "train").rglob("*.JPEG"))[::4]:
        path.write_bytes(path.read_bytes()[:200])
    result = run(
        2, "train", "--config", "folder", "--data.root", str(root), "--output", str(folder), "--engine.threads", "1",
        "--optim.epochs", "9", "--optim.batch-size", "6", "--data.workers", "1", "--data.max-bad-images", "4",
    )  # fmt: skip
    assert result.returncode != 0
    assert "data.max_bad_images is 4" in result.stderr
    assert len(read_skipped(folder / "skipped_images.txt")) in (5, 6)  # both processes may list theirs at once
