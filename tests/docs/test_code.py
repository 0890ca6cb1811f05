"""Every block of Python on every page runs and prints what it says; every command has the options that pages show."""

import contextlib
import doctest
import functools
import io
import re
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import timm
import torch
from PIL import Image
from scripts.generated_pages import read_help

import cbsa_torch.models.hub
import cbsa_torch.train.hub
from cbsa_torch.cli import COMMANDS
from cbsa_torch.models import save_checkpoint
from tests.helpers.doc_pages import PAGES, read_blocks
from tests.helpers.hub import INFO, write_weights
from tests.helpers.slides import write_trident

CREATE = timm.create_model


def image(path, size, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 2, (*size, 3) if mode == "RGB" else size, dtype=np.uint8)
    Image.fromarray(pixels * 255 if mode == "RGB" else pixels).save(path)


def no_pretrained_weights(names, folder, monkeypatch):
    def create(*args, pretrained=False, **options):
        return CREATE(*args, **options)

    monkeypatch.setattr(timm, "create_model", create)


def images_with_masks(names, folder, monkeypatch):
    for i in range(2):
        image(folder / f"images/{i}.png", (8, 8))
        image(folder / f"masks/{i}.png", (8, 8), "L")
    names["transform"] = lambda picture: (
        torch.from_numpy(np.array(picture.convert("L"), np.float32))[None] / 255
    )


def one_process(names, folder, monkeypatch):
    address = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    names |= {"images": torch.randn(1, 3, 64, 64), "labels": torch.tensor([0])}
    names |= {"features": torch.randn(1, 40, 1536), "coords": torch.rand(1, 40, 2)}
    names |= {"features_of_this_process": names["features"], "tokens": torch.randn(1, 200 * 300, 384)}


def ade20k(names, folder, monkeypatch):
    for part in ("training", "validation"):
        image(folder / f"ADEChallengeData2016/images/{part}/a.jpg", (600, 700))
        image(folder / f"ADEChallengeData2016/annotations/{part}/a.png", (600, 700), "L")
    image(folder / "mask.png", (4, 4))
    Image.new("RGB", (4, 4), (255, 0, 0)).save(folder / "mask.png")
    names |= {"logits": torch.randn(2, 150, 8, 8), "masks": torch.randint(0, 150, (2, 8, 8))}


def large_sources(names, folder, monkeypatch):
    np.save(folder / "scan.npy", np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    write_trident(folder / "slide.h5", np.ones((50, 16), np.float32), np.arange(100).reshape(50, 2) * 512)
    names["model"] = CREATE("cbt_nano_patch4_32")
    names["slide_model"] = CREATE("token_set_cbt_tiny", in_dim=16, depth=1)


def slides_as_pictures(names, folder, monkeypatch):
    no_pretrained_weights(names, folder, monkeypatch)
    pixels = np.random.default_rng(0).integers(0, 200, (600, 520, 3), dtype=np.uint8)
    pixels[:, 256:512] = 240  # glass
    (folder / "slides").mkdir()
    tifffile.imwrite(folder / "slides/a.tif", pixels, photometric="rgb")


def slides_and_a_run(names, folder, monkeypatch):
    slides_as_pictures(names, folder, monkeypatch)
    (folder / "features").mkdir()
    coords = np.array([(0, 0), (0, 256)])
    write_trident(folder / "features/a.h5", np.eye(2, 384, dtype=np.float32), coords, tile=256)
    (folder / "runs/slides").mkdir(parents=True)
    info = {"model": "token_set_cbt_tiny", "model_args": {"in_dim": 384, "depth": 1, "num_classes": 2}}
    model = CREATE(info["model"], **info["model_args"])
    save_checkpoint(folder / "runs/slides/model.safetensors", model, info)
    (folder / "maps").mkdir()
    (folder / "maps/a_map.csv").write_text("tile,x,y,attention\n0,0,0,0.1\n1,0,256,0.3\n")


def hub(names, folder, monkeypatch):
    (folder / "runs/photos").mkdir(parents=True)
    write_weights(folder / "runs/photos", {**INFO, "val_top1": 0.9})

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, **_):
            return "https://huggingface.co/me/photos/commit/1"

    monkeypatch.setattr(cbsa_torch.train.hub, "HfApi", Api)
    monkeypatch.setattr(
        cbsa_torch.models.hub,
        "hf_hub_download",
        lambda _, filename, **__: str(folder / "runs/photos" / filename),
    )


PREPARED = {
    "docs/use/adapt.md": no_pretrained_weights,
    "docs/reference/report.md": images_with_masks,
    "docs/reference/segmentation_data.md": ade20k,
    "docs/use/parallel.md": one_process,
    "docs/reference/parallel.md": one_process,
    "docs/use/runs.md": hub,
    "docs/use/slide_maps.md": slides_and_a_run,
    "docs/use/slide_tiles.md": slides_as_pictures,
    "docs/use/streaming.md": large_sources,
}
"""What pages take for granted: files, processes, the Hub."""


SLOW = ("docs/use/export.md", "docs/use/interpret.md")


def python_pages():
    for page in PAGES:
        if read_blocks(page, "python"):
            yield pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])


@pytest.fixture
def _no_group_is_left():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings(
    "ignore:Grad strides do not match bucket view strides"
)  # DDP says so of one process
@pytest.mark.usefixtures("_no_group_is_left")
@pytest.mark.parametrize("page", [*python_pages()])
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    PREPARED.get(page, lambda *_: None)(names, tmp_path, monkeypatch)
    for block in read_blocks(page, "python"):
        code = compile("\n" * (block.line - 1) + block.text, page, "exec")  # errors name the line of the page
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if block.shown is not None:  # "..." stands for anything
            assert doctest.OutputChecker().check_output(block.shown, printed.getvalue(), doctest.ELLIPSIS), (
                f"{page}, the block of line {block.line} prints\n{printed.getvalue()}"
            )


def commands(page):
    """The words of every ``cbsa ...`` in the blocks of bash of a page."""
    for block in read_blocks(page, "bash"):
        assert "-m cbsa_torch " not in block.text, f"{page}: the commands are those of cbsa_torch.cli"
        for line in block.text.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:\bcbsa|-m cbsa_torch\.cli) (.*)", line)
            if match and not line.lstrip().startswith("#"):
                yield shlex.split(match[1].rstrip("'"), comments=True)


@functools.cache
def options_of(*args):
    return {name for option in read_help(*args).options for name in option.names}


@pytest.mark.parametrize("page", [page for page in PAGES if [*commands(page)]])
def test_commands_have_these_options(page):
    for command, *words in commands(page):
        assert command in COMMANDS
        first = words[:1] if command in ("bench", "data") else []
        recipe = words[words.index("--config") :][:2] if "--config" in words else []
        known = options_of(command, *first, *recipe) | {
            "--config",
            "--model",
            "--data",
            "--weights",
            "--stage-epochs",
        }
        assert {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")} <= known
