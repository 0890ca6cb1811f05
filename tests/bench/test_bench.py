"""Benchmarks measure what they say: baselines, memory, and the command."""

import functools
import json

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode

from cbsa_torch import CBSA
from cbsa_torch.bench import layers, measure, models
from cbsa_torch.bench.baselines import LowerBound, NaiveCBSA, NaiveCBT, Nystrom
from cbsa_torch.cli import main
from tests.helpers.compare import relative_error


def test_the_naive_baseline_is_the_layer():
    plain = NaiveCBSA(32, 2, num_representatives=16).double()
    ours = CBSA(32, 2, num_representatives=16, num_prefix_tokens=1, impl="eager").double()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 1 + 81, 32, dtype=torch.float64)
    assert relative_error(plain(x), ours(x)) < 1e-12


@pytest.mark.parametrize("ista_products", [2, 3])
def test_the_naive_model_is_the_model(ista_products):
    torch.manual_seed(0)
    sizes = {"img_size": 36, "patch_size": 4, "in_chans": 3, "num_classes": 7}
    sizes |= {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_representatives": 16}
    plain = NaiveCBT(**sizes, ista_products=ista_products)
    ours = timm.create_model("cbt_tiny_patch16_224", **sizes)
    ours.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 36, 36)
    assert relative_error(plain(images), ours(images)) < 1e-5  # training: batch norm by these images
    assert relative_error(plain.eval()(images), ours.eval()(images)) < 1e-5
    assert relative_error(plain(images), reparameterize_model(ours)(images)) < 1e-5


def test_the_lower_bound_has_four_products():
    n, d, m = 50, 32, 16
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        LowerBound(d, 2, m)(torch.randn(1, n, d))
    assert counter.get_total_flops() == 4 * n * d**2 + 4 * n * m * d


def test_memory_counts_allocations():
    def allocate():
        torch.empty(500)
        return torch.empty(1000)

    used = measure.memory(allocate, "cpu")
    assert 4000 <= used.left <= 4096  # allocations may be rounded up
    assert used.left <= used.peak <= used.left + 2200


def test_every_layer_is_measured_at_every_size():
    sizes = [layers.Size(2, 4), layers.Size(1, 8)]
    rows = layers.compare(sizes, forward_sizes=[layers.Size(1, 12)], dim=16, num_heads=2, repetitions=1)
    expected = set(layers.CANDIDATES) - {"cbsa triton"}
    for size in sizes:
        own = [r for r in rows if (r.batch, r.tokens) == (size.batch, size.tokens)]
        assert {r.name for r in own if r.training} == expected
        assert {r.name for r in own if not r.training} == expected - {"cbsa tiled, recompute"}
        assert all(r.milliseconds > 0 and r.peak > 0 for r in own)
        assert all((r.saved is not None and r.saved >= 1) == r.training for r in own)
    assert {r.training for r in rows if r.tokens == 145} == {False}
    limited = layers.compare(sizes[1:], dim=16, num_heads=2, repetitions=1, quadratic_limit=20)
    assert {r.name for r in limited if r.training} == expected - set(layers.QUADRATIC)


def test_quartiles():
    assert measure.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert measure.quartiles([1.0]) == (1.0, 1.0, 1.0)


def test_models_are_measured():
    naive, ours = names = ["naive_cbt_pico_patch1_8", "cbt_pico_patch1_8"]
    sizes = [models.ModelSize(2, 8)]
    rows = models.compare(names, sizes=sizes, step_sizes=[models.ModelSize(3, 8)], repetitions=2)
    assert [(r.name, r.batch, r.training) for r in rows] == [
        *((name, 2, False) for name in (naive, ours, f"{ours} fused")),
        *((name, batch, True) for batch in (2, 3) for name in names),
    ]
    for r in rows:
        assert r.repetitions == 2
        assert r.quartiles[0] <= r.milliseconds <= r.quartiles[1]
        assert r.images_per_second == pytest.approx(1e3 * r.batch / r.milliseconds)
        assert r.peak_mib > 0
        assert (r.saved_mib is not None) == r.training
    assert [r.speedup for r in rows if r.name == naive] == [1.0] * 3


def test_nystroem_attention_is_in_every_block():
    model, _ = models._create("nystrom_vit_tiny_patch16_224", 32)
    model.eval()(torch.randn(1, 3, 32, 32))
    assert [type(block.attn) for block in model.blocks] == [Nystrom] * 12
    assert model.blocks[0].attn.attention.num_landmarks == 64


def test_compiled_models_are_measured(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    name = "cbt_pico_patch1_8"
    rows = models.compare([name], sizes=[models.ModelSize(1, 8)], compiled=True, repetitions=1)
    variants = ["", " fused", " compiled", " fused compiled"]
    assert [r.name for r in rows if not r.training] == [name + variant for variant in variants]
    assert [r.name for r in rows if r.training] == [name, f"{name} compiled"]


def test_ratios_of_the_models():
    def row(name, milliseconds, training=False):
        return models.ModelRow(name, 1, 8, training, milliseconds, (0, 0), 1, 0, 0, 0, None)

    rows = [row("naive_cbt_x", 6), row("cbt_x", 4), row("cbt_x fused", 3), row("vit_x", 9)]
    rows += [row("naive_cbt_x compiled", 4), row("cbt_x fused compiled", 2), row("cbt_x", 5, True)]
    rows += [row("naive_cbt_x", 10, True)]
    assert models.ratios(rows) == {models.ModelSize(1, 8): [2, 2, 3, 2, None, None]}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["layers", "--sizes", "1x4", "--forward-sizes", "1x8", "--dim", "16", "--num-heads", "2"], "mhsa"),
        (["models", "--models", "cbt_pico_patch1_8", "--sizes", "1x8", "--step-sizes"], "step: CBT / ViT"),
    ],
)
def test_the_command_writes_numbers_and_plots(arguments, shown, tmp_path, capsys):
    output = tmp_path / "results"
    threads = torch.get_num_threads()
    try:
        code = main(["bench", *arguments, "--repetitions", "1", "--threads", "1", "--output", str(output)])
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    assert shown in capsys.readouterr().out
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["environment"]["torch"] == torch.__version__
    assert all(row["milliseconds"] > 0 for row in record["rows"])
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert output.with_suffix(".svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "layers|models"),
        (["layer"], "layers|models"),
        (["layers", "--sizes", "4*32"], "BATCHxSIDE"),
        (["layers", "--only", "cbsa"], "no candidate"),
        (["models", "--step-sizes", "224"], "BATCHxSIDE"),
        (["models", "--dtype", "bfloat16"], "float32 only"),
        (["models", "--models", "naive_vit_tiny_patch16_224"], "no model naive_vit"),
        (["models", "--models", "nystrom_cbt_tiny_patch16_224"], "no model nystrom_cbt"),
    ],
)
def test_bad_options(arguments, message, capsys):
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_package_of_nystroem_attention_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("cbsa_torch.cli.bench.find_spec", lambda name: None)
    assert main(["bench", "models"]) == 1
    assert "pip install nystrom-attention" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(capsys):
    assert main(["bench", "models", "--device", "cuda"]) == 1
    assert "no CUDA device" in capsys.readouterr().err
