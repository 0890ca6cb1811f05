"""Every example of the API reference runs and prints what it says."""

import contextlib
import doctest
import io
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image

import cbsa_torch.train.hub
from cbsa_torch.models import save_checkpoint
from cbsa_torch.nn import install_grid_hook
from cbsa_torch.train import train
from tests.helpers.colour_folder import tiny_config, write_colours
from tests.helpers.masked_folder import write_masked_folder
from tests.helpers.official import official_model, official_state
from tests.helpers.reference import PAGES, VALUES, find, members
from tests.helpers.slides import write_trident


def photos(folder, monkeypatch):
    write_colours(folder / "photos")


def scenes(folder, monkeypatch):
    write_masked_folder(folder / "scenes")


def a_run(folder, monkeypatch):
    photos(folder, monkeypatch)
    config = tiny_config("photos", "runs/photos")
    config.optim.epochs, config.engine.tracker, config.engine.cpu = 1, "none", True
    with contextlib.redirect_stdout(io.StringIO()):
        train(config)


def a_vit(folder, monkeypatch):
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    vit = timm.create_model("vit_tiny_patch16_224", **args)
    info = {"model": "vit_tiny_patch16_224", "model_args": args, "class_names": ["blue", "green", "red"]}
    info["input"] = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    save_checkpoint(folder / "vit.safetensors", vit, info)


def a_released_checkpoint(folder, monkeypatch):
    torch.save(official_state(official_model()), folder / "released.pth")


def pascal_voc(folder, monkeypatch):
    root = folder / "VOCdevkit/VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / part).mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(root / "JPEGImages/a.jpg")
    mask = Image.new("P", (3, 2), 15)
    mask.putpalette([0, 0, 0, 128, 0, 0])
    mask.save(root / "SegmentationClass/a.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("a\n")


def emoji(folder, monkeypatch):
    drawings = np.full((6, 64, 64, 4), 255, np.uint8)
    labels, splits = np.arange(6) % 2, np.arange(6) // 2
    names = {
        "category_names": np.array(["Animals", "Flags"]),
        "split_names": np.array(["train", "val", "test"]),
    }
    np.savez(folder / "emoji64.npz", google=drawings, twitter=drawings, label=labels, split=splits, **names)


def a_slide(folder, monkeypatch):
    write_trident(folder / "slide.h5", np.ones((50, 16), np.float32), np.arange(100).reshape(50, 2) * 512)


def one_process(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)


def no_hub(folder, monkeypatch):
    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, **_):
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr(cbsa_torch.train.hub, "HfApi", Api)


TAKEN = {
    "adaptation": (photos, a_vit),
    "images": (photos, scenes),
    "interpret": (scenes, pascal_voc),
    "models": (a_run, a_released_checkpoint),
    "segmentation": (scenes, emoji),
    "streaming_parallel": (a_slide, one_process),
    "training": (a_run, no_hub),
}
"""What examples of a page take for granted: files, processes, the Hub."""


@pytest.fixture
def _left_as_it_was():
    yield
    install_grid_hook()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
@pytest.mark.usefixtures("_left_as_it_was")
@pytest.mark.parametrize("page", [page for page, paths in PAGES.items() if paths])
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for prepare in TAKEN.get(page, ()):
        prepare(tmp_path, monkeypatch)
    parser, printed = doctest.DocTestParser(), io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    paths = [path for entry in PAGES[page] for path in members(entry) if path not in VALUES]
    for path in paths:
        test = parser.get_doctest(find(path).__doc__, {"torch": torch}, path, None, 0)
        assert test.examples, f"{path} has no example"
        torch.manual_seed(0)
        runner.run(test, out=printed.write)
    assert runner.failures == 0, printed.getvalue()
