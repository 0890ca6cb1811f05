"""Committed experiments: they run, measure what they say, and the docs state what they measured."""

import json
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from examples import (
    compress_lines,
    contract_animation,
    demo_figures,
    native_sizes,
    point_cloud,
    slides,
    sparse_patches,
    timm_training,
)

from benchmarks import adapt_table, digits_family, segmentation_decoders
from tests.helpers import processes

ROOT = Path(__file__).parents[1]


def run_example(module, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
    module.main()


def test_every_example_is_run_by_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    imported = re.findall(r"from examples import (?:\(([^)]+)\)|([\w, ]+))", tests)
    named = set(re.findall(r"\w+", " ".join(map(" ".join, imported))))
    assert {path.stem for path in (ROOT / "examples").glob("[a-z]*.py")} == named


def test_linear_cbsa_presses_points_onto_their_lines(tmp_path):
    options = compress_lines.Options()
    points, directions = compress_lines.noisy_lines(options)
    states = compress_lines.compress(points, options, [0, options.iterations])
    before, after = (compress_lines.measure(state, directions) for state in states.values())
    assert before["angle_to_own_line"] > 15
    assert after["angle_to_own_line"] < 2
    assert after["separation"] > 3 * before["separation"]
    assert after["nearest_line_is_own"] == 1.0
    recorded = json.loads((ROOT / "docs/images/lines.json").read_text())["measures"]
    for ours, theirs in ((before, recorded["0"]), (after, recorded["1024"])):
        assert ours == pytest.approx(theirs, rel=1e-6)
    figure = compress_lines.draw(states, {0: before, options.iterations: after})
    figure.savefig(tmp_path / "lines.png")
    assert len(figure.axes) == 2


def test_angles_are_to_lines_not_to_rays():
    directions = torch.eye(3, dtype=torch.float64)
    points = torch.stack([-directions, 2 * directions], dim=1)[None]  # (1, 3 classes, 2 points, 3)
    found = compress_lines.measure(points, directions)
    assert found["angle_to_own_line"] == pytest.approx(0, abs=1e-5)
    assert found["separation"] == pytest.approx(90)


def test_features_of_sparse_patches_are_near_those_of_all():
    options = sparse_patches.Options(image_size=64, dim=32, depth=2, kept=(1.0, 0.25))
    whole, quarter = sparse_patches.measure(options)
    assert (whole["tokens"], quarter["tokens"]) == (64, 16)
    assert whole["similarity"] == pytest.approx(1, abs=1e-5)
    assert 0.7 < quarter["similarity"] < 0.999


def test_images_of_many_sizes_are_as_they_would_be_alone():
    rows = native_sizes.measure(native_sizes.Options())
    assert [row["tokens"] for row in rows] == [65, 73, 116, 257, 65]
    assert all(row["error"] < 1e-12 for row in rows)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm leaves the files of images open
@pytest.mark.parametrize("name", ["cbt_nano_patch4_32", "crate_cbt_nano_patch4_32", "tost_nano_patch4_32"])
def test_parts_of_timm_train_save_and_resume_our_names(name, tmp_path):
    data = timm_training.draw_images(tmp_path / "data", count=8)
    options = timm_training.Options(model=name, epochs=3, output=tmp_path / "whole")
    whole = timm_training.train(options, data)
    half = replace(options, epochs=2, output=tmp_path / "half")
    first = timm_training.train(half, data)
    rest = timm_training.train(replace(half, epochs=3, resume=half.output / "last.pth.tar"), data)
    assert first + rest == whole  # to the last bit: weights, averages, optimiser and schedule came back
    assert whole[-1]["loss"] < whole[0]["loss"]
    assert whole[-1]["accuracy"] > 90


def test_the_moving_picture_has_the_rates_that_are_measured(tmp_path, monkeypatch):
    run_example(contract_animation, monkeypatch, "--output", tmp_path / "contract.svg")
    drawn, committed = (
        [float(rate) for rate in re.findall(r"(?:rate|to|most) (\d+\.\d+)", path.read_text())]
        for path in (tmp_path / "contract.svg", ROOT / "docs/images/contract.svg")
    )
    assert drawn == pytest.approx(committed, abs=0.011)
    for before, again, after, most in zip(*(iter(drawn),) * 4, strict=True):
        assert after <= most < before == again
    assert ET.parse(tmp_path / "contract.svg").getroot().tag.endswith("svg")


def test_figures_of_the_demo(tmp_path, capsys):
    """With the weights that come with the package in place of those of the demo."""
    demo_figures.main("cbt_pico_patch1_8.certified_digits", str(tmp_path))
    assert re.search(r"it holds in ([\d,]+) of \1 cases", capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"digits.png", "certificate.png"}


@pytest.mark.slow
def test_a_model_of_slides_says_where_it_looks(tmp_path, monkeypatch, capsys):
    run_example(slides, monkeypatch, "--folder", tmp_path, "--slides", 40, "--epochs", 2)
    printed = capsys.readouterr().out
    assert "test slides: AUC" in printed
    assert Path(re.search(r"where it looks: (\S+)", printed)[1]).stat().st_size > 1000


def test_clouds_of_points_are_learned():
    rows = point_cloud.measure(point_cloud.Options(steps=15))
    assert sum(row["loss"] for row in rows[-4:]) < 0.8 * sum(row["loss"] for row in rows[:4])


def test_members_train_by_one_command_and_are_counted(tmp_path, monkeypatch):
    def run(command, **_):
        assert command[:3] == [sys.executable, "-m", "cbsa_torch.cli"]
        return processes.run(1, *command[3:])

    monkeypatch.setattr(digits_family, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(digits_family, "STEPS", 2)
    options = digits_family.Options(
        members=("linear_cbt", "cbt_exact"), seeds=(0,), epochs=1, runs=tmp_path, threads=1
    )
    record = digits_family.measure(options)
    assert [row["member"] for row in record["rows"]] == ["linear_cbt", "cbt_exact"]
    for row in record["rows"]:
        assert row["parameters"] > 120_000
        assert row["flops"] > 1e7
        assert row["step_ms"] > 0
        assert 0 <= row["mean"] <= 1
        assert row["sd"] is None
    config = (tmp_path / "cbt_exact_seed0" / "config.yaml").read_text()
    assert "contraction: exact" in config
    written = (tmp_path / "cbt_exact_seed0" / "metrics.jsonl").stat().st_mtime_ns
    digits_family.train_once(options, "cbt_exact", 0)  # finished: kept
    assert (tmp_path / "cbt_exact_seed0" / "metrics.jsonl").stat().st_mtime_ns == written
    config = digits_family.configuration(options, "cbt_exact", 0)
    assert digits_family.is_finished(config)
    assert not digits_family.is_finished(replace(config, seed=1))
    assert "| `cbt_exact` | `cbt_pico_patch1_8`, `contraction='exact'` |" in digits_family.markdown(record)
    with pytest.raises(SystemExit, match="no member 'vgg'"):
        digits_family.measure(digits_family.Options(members=("vgg",)))


def test_the_docs_state_the_recorded_digits():
    record = json.loads((ROOT / digits_family.RESULTS).read_text())
    assert [row["member"] for row in record["rows"]] == list(digits_family.MEMBERS)
    docs = (ROOT / digits_family.DOCS).read_text()
    begin, end = digits_family.MARKERS
    assert docs.split(begin)[1].split(end)[0].strip() == digits_family.markdown(record)


def test_the_docs_state_the_recorded_decoders():
    record = json.loads((ROOT / segmentation_decoders.Options.results).read_text())
    assert [row["mixer"] for row in record["rows"]] == list(segmentation_decoders.MIXERS)
    assert segmentation_decoders.markdown(record) in (ROOT / "docs/results/segmentation.md").read_text()


@pytest.mark.parametrize("name", ["animals28", "emoji64", "cost"])
def test_the_docs_state_the_recorded_adapted_vits(name):
    """The record, its table, and the page hold the same."""
    results = ROOT / "benchmarks/results"
    record = json.loads((results / f"adapted_{name}.json").read_text())
    table = adapt_table.markdown(record)
    assert (results / f"adapted_{name}.md").read_text() == table
    assert table.strip() in (ROOT / "docs/results/adaptation.md").read_text()
