"""What each extra promises, tried in an environment that has it: ``python scripts/extra_promises.py EXTRA``.

``scripts/check_extras.py`` makes the environments. A promise is a function; its docstring is what is printed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for more

import torch
from torch import Tensor

import cbsa_torch

SOURCE = Path(__file__).resolve().parents[1] / "src" / "cbsa_torch"
SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2, "num_representatives": 4}
NEED_INTERPRET = {"report", "compare", "bench"}
"""Commands that need the extra interpret, too."""
ONE_EPOCH = ("--optim.epochs", "1", "--optim.warmup-epochs", "0", "--optim.batch-size", "128")


# ---- in every environment


def files() -> None:
    """The wheel has every file of the sources: modules, recipes, templates, py.typed."""
    folder = Path(cbsa_torch.__file__).parent
    assert folder.is_relative_to(sys.prefix), f"{folder} does not belong to this environment"
    installed, expected = (
        {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"}
        for root in (folder, SOURCE)
    )
    assert {"py.typed", "train/recipes/digits.yaml"} <= installed
    assert any(name.endswith("report.html.j2") for name in installed)
    assert installed == expected, f"installed or in the sources only: {sorted(installed ^ expected)}"


def operator_and_layers() -> None:
    """Operators and layers run forward and backward."""
    tokens = torch.randn(1, 2, 9, 8)
    assert cbsa_torch.ops.mssa(tokens).shape == tokens.shape
    x = torch.randn(2, 9, 16, requires_grad=True)
    for name in ("CBSA", "MSSA", "TSSA", "MHSA", "AgentAttention", "LinearCBSA"):
        layer = getattr(cbsa_torch, name)(16, 2)
        layer(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters()), name


def command() -> None:
    """The command cbsa is installed."""
    program = Path(sys.executable).with_name("cbsa")
    printed = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == cbsa_torch.__version__


# ---- base


def torch_alone() -> None:
    """Nothing but torch and its requirements is needed."""
    foreign = ("numpy", "PIL", "timm", "matplotlib", "yaml")
    present = [name for name in foreign if importlib.util.find_spec(name)]
    assert not present, f"also installed: {present}"


def without_models() -> None:
    """cbsa_torch.models and adapt_vit name the extra they need."""
    expect_missing("models", lambda: cbsa_torch.models)
    expect_missing("models", lambda: cbsa_torch.adapt_vit)


def without_interpret() -> None:
    """cbsa_torch.interpret.report names the extra it needs."""
    expect_missing("interpret", lambda: cbsa_torch.interpret.report)


def without_train() -> None:
    """cbsa_torch.train and the commands name the extra they need."""
    expect_missing("train", lambda: cbsa_torch.train)
    for name in ("train", "list", "count", "report"):
        cbsa_lacks("train", name)


# ---- models


def families() -> None:
    """A model of each family is created and runs."""
    import timm

    names: dict[str, str] = {}
    for name, family in cbsa_torch.models.registry.names().items():
        names.setdefault(family, name)
    assert len(names) > 5
    for name in names.values():
        model = timm.create_model(name, num_classes=3).eval()
        size = model.pretrained_cfg["input_size"]
        assert model(torch.randn(1, *size)).shape == (1, 3), name


def checkpoints() -> None:
    """A checkpoint is written and read."""
    import timm

    model = timm.create_model("cbt_pico_patch1_8", **SMALL).eval()
    images = torch.randn(2, 1, 8, 8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        cbsa_torch.models.save_checkpoint(path, model, {"model": "cbt_pico_patch1_8", "model_args": SMALL})
        loaded, _ = cbsa_torch.models.load_checkpoint(path)
    torch.testing.assert_close(loaded(images), model(images))


def trained_weights() -> None:
    """The weights that come with the package are loaded."""
    import timm

    name = "cbt_pico_patch1_8.certified_digits"
    model = timm.create_model(name, pretrained=True).eval()
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(cbsa_torch.models.from_pretrained(name)(images), model(images))


def counting() -> None:
    """Parameters and FLOPs are counted."""
    import timm

    from cbsa_torch.models.counting import count_model

    counted = count_model(timm.create_model("cbt_pico_patch1_8", **SMALL), (1, 8, 8))
    assert counted.total.counts.flops > 0


def adapting() -> None:
    """adapt_vit and segmenter build on a ViT of timm."""
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3)
    adapted, _ = cbsa_torch.adapt_vit(vit)
    images = torch.randn(1, 3, 32, 32)
    assert adapted(images).shape == (1, 3)
    segmenter = cbsa_torch.models.segmenter(encoder_args={"depth": 1}, img_size=32, num_classes=3, depth=1)
    assert segmenter(images).shape == (1, 3, 32, 32)


# ---- streaming


def streaming() -> None:
    """An image is streamed from an array, with a map and its picture."""
    import numpy as np
    import timm

    import cbsa_torch.models
    import cbsa_torch.streaming

    model = timm.create_model("cbt_pico_patch1_8", **SMALL).eval()
    image = np.random.default_rng(0).random((12, 9), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        result = cbsa_torch.streaming.stream(model, image, f"{folder}/out", results=["logits", "map"])
        assert result.files["picture"].exists()
    torch.testing.assert_close(result.logits, model(torch.from_numpy(image)[None, None]))


# ---- interpret


class Classifier(torch.nn.Module):
    """A model of plain torch around layers of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Conv2d(1, 16, 1)
        self.layers = torch.nn.ModuleList(cbsa_torch.CBSA(16, 2, num_representatives=4) for _ in range(2))
        self.head = torch.nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the three classes."""
        x = self.embed(images)  # (B, 16, height, width)
        grid_size = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)  # (B, N, 16)
        for layer in self.layers:
            x = x + layer(x, grid_size=grid_size)
        logits: Tensor = self.head(x.mean(1))
        return logits


def looking_inside() -> None:
    """Capture, coding rates and a page of a model of plain torch."""
    from cbsa_torch import interpret

    model, images = Classifier().eval(), torch.rand(4, 1, 8, 8)
    with interpret.capture(model) as records, torch.no_grad():
        model(images)
    assert len(records) == 2
    assert len(interpret.coding_rates(model, [images]).layers) == 2
    with tempfile.TemporaryDirectory() as folder:
        written = interpret.report(model, images, folder, robustness_images=2)
        assert "<html" in written.page.read_text(encoding="utf-8")


def without_timm() -> None:
    """No timm is needed."""
    assert importlib.util.find_spec("timm") is None


# ---- train


def commands() -> None:
    """Commands run: train, eval, predict, list and count."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        run, image = train(folder), f"{folder}/image.png"
        Image.new("L", (8, 8), 128).save(image)
        cbsa("eval", "--checkpoint", run)
        cbsa("predict", "--checkpoint", run, image)
    cbsa("list")
    cbsa("count", "cbt_pico_patch1_8")


def helps() -> None:
    """Every command has a help, but those that draw name the extra they need without it."""
    from cbsa_torch.cli import COMMANDS

    lacking = set() if importlib.util.find_spec("matplotlib") else NEED_INTERPRET
    for name in COMMANDS:
        if name in lacking:
            cbsa_lacks("interpret", name, "--help")
        else:
            cbsa(name, "--help")


def plot_without_interpret() -> None:
    """Counting with --plot names the extra it needs."""
    cbsa_lacks("interpret", "count", "cbt_pico_patch1_8", "--plot", "plot.png")


# ---- slides


def slides() -> None:
    """A file of features is read, and a map of it drawn."""
    import h5py

    from cbsa_torch.interpret import coordinate_map
    from cbsa_torch.train.tasks.slides.files import read_slide

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "slide.h5")
        with h5py.File(path, "w") as file:
            file["features"], file["coords"] = torch.randn(9, 4).numpy(), torch.arange(18).view(9, 2).numpy()
        slide = read_slide(path)
    assert slide.coords is not None
    assert slide.features.shape == (9, 4)
    coordinate_map(slide.coords, slide.features[:, 0])


# ---- export


def onnx_graph() -> None:
    """A model is written as an ONNX graph of any size, and compared with it."""
    import timm

    from cbsa_torch.models import export_model

    model = timm.create_model("cbt_nano_patch4_32", **{**SMALL, "num_representatives": (2, 2)})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        report = export_model(model, file, in_chans=3, image_size=32, any_size=True)
        assert file.stat().st_size == report.num_bytes


# ---- all


def pages() -> None:
    """Commands draw: report the page of a trained model, count a plot."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(folder)
        few = ("--images", "4", "--shown", "1", "--robustness-images", "0")
        cbsa("report", "--checkpoint", run, *few)
        assert "<html" in Path(run, "report.html").read_text(encoding="utf-8")
        cbsa("count", "cbt_pico_patch1_8", "--plot", f"{folder}/plot.png")


# ---- running


EVERYWHERE = (files, operator_and_layers, command)
MODELS = (families, checkpoints, trained_weights, counting, adapting)
PROMISES: dict[str, tuple[Callable[[], None], ...]] = {
    "base": (torch_alone, without_models, without_interpret, without_train),
    "models": (*MODELS, without_interpret, without_train),
    "streaming": (streaming, *MODELS, without_interpret, without_train),
    "interpret": (looking_inside, without_timm, without_models, without_train),
    "train": (commands, helps, plot_without_interpret, streaming, *MODELS, without_interpret),
    "slides": (slides, pages, commands, *MODELS),
    "export": (onnx_graph, *MODELS, without_interpret, without_train),
    "all": (slides, onnx_graph, pages, commands, helps, looking_inside, streaming, *MODELS),
}


def train(folder: str) -> str:
    """Train a tiny model on the digits for one epoch; returns the run's folder."""
    run = f"{folder}/run"
    args = [str(part) for pair in SMALL.items() for part in pair]
    cbsa("train", "--config", "digits", "--output", run, *ONE_EPOCH, "--model.args", *args)
    return run


def cbsa(*args: str) -> None:
    """Run a command that must succeed."""
    code, printed = run_cbsa(*args)
    assert code == 0, f"cbsa {' '.join(args)}: exit code {code}\n{printed}"


def cbsa_lacks(extra: str, *args: str) -> None:
    """Run a command that must name a missing extra."""
    code, printed = run_cbsa(*args)
    assert code == 1, f"cbsa {' '.join(args)}: exit code {code}\n{printed}"
    assert f"pip install 'cbsa-torch[{extra}]'" in printed, f"cbsa {' '.join(args)}: {printed}"


def run_cbsa(*args: str) -> tuple[int, str]:
    """The exit code of a command and what it printed."""
    from cbsa_torch.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            code = main(args)
        except SystemExit as end:  # --help
            code = int(end.code or 0)
    return code, out.getvalue()


def expect_missing(extra: str, use: Callable[[], object]) -> None:
    """Use something that must name a missing extra."""
    try:
        use()
        message = "no error"
    except ImportError as error:
        message = str(error)
    assert f"pip install 'cbsa-torch[{extra}]'" in message, message


def main(extra: str) -> int:
    """Try every promise; returns the exit code."""
    failed = 0
    for promise in (*EVERYWHERE, *PROMISES[extra]):
        torch.manual_seed(0)
        try:
            promise()
        except BaseException:
            failed += 1
            print(f"{extra}: FAILED: {promise.__doc__}\n{traceback.format_exc()}", flush=True)
        else:
            print(f"{extra}: {promise.__doc__}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
