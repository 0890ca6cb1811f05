"""Benchmarks measure what they say: baselines, memory, and the command."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cbsa_torch import CBSA
from cbsa_torch.bench import layers, measure, models
from cbsa_torch.bench.baselines import LowerBound, NaiveCBSA
from cbsa_torch.cli import main
from tests.helpers.compare import relative_error


def test_the_naive_baseline_is_the_layer():
    plain = NaiveCBSA(32, 2, num_representatives=16).double()
    ours = CBSA(32, 2, num_representatives=16, num_prefix_tokens=1, impl="eager").double()
    state = plain.state_dict()
    ours.load_state_dict(
        {
            "qkv.weight": state["to_subspaces.weight"],
            "proj.weight": state["to_out.weight"],
            "proj.bias": state["to_out.bias"],
            "step_representatives": state["step_rep"].flatten(),
            "step_tokens": state["step_x"].flatten(),
        }
    )
    x = torch.randn(2, 1 + 81, 32, dtype=torch.float64)
    assert relative_error(plain(x), ours(x)) < 1e-12


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


def test_models_are_measured():
    names = [
        "cbt_pico_patch1_8 impl=tiled",
        "cbt_pico_patch1_8 attn=lower_bound",
        "cbt_pico_patch1_8 attn=naive",
    ]
    rows = models.compare(names, image_sizes=[8], batches=[2], repetitions=1)
    assert [(r.name, r.training) for r in rows] == [
        (name, training) for training in (False, True) for name in names
    ]
    assert all(r.images_per_second > 0 and (r.saved_mib is not None) == r.training for r in rows)


def test_the_command_writes_numbers_and_plots(tmp_path, capsys):
    output = tmp_path / "layers"
    arguments = ["--sizes", "1x4", "--forward-sizes", "1x8", "--dim", "16", "--num-heads", "2"]
    threads = torch.get_num_threads()
    try:
        code = main(
            ["bench", "layers", *arguments, "--repetitions", "1", "--threads", "1", "--output", str(output)]
        )
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    assert "cbsa tiled" in capsys.readouterr().out
    record = json.loads(output.with_suffix(".json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert {row["name"] for row in record["rows"]} >= {"lower_bound", "naive", "mhsa"}
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert output.with_suffix(".svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "layers|models"),
        (["layer"], "layers|models"),
        (["layers", "--sizes", "4*32"], "BATCHxSIDE"),
        (["layers", "--only", "cbsa"], "no candidate"),
        (["models", "--batches", "1"], "--batches"),
    ],
)
def test_bad_options(arguments, message, capsys):
    assert main(["bench", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(capsys):
    assert main(["bench", "models", "--device", "cuda"]) == 1
    assert "no CUDA device" in capsys.readouterr().err
