"""Runs on images of their own sizes: trained, resumed, evaluated and predicted in packed batches."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cbsa_torch import cli
from cbsa_torch.models import WhiteBoxTransformer
from cbsa_torch.train import evaluate_checkpoint, open_trained, train
from cbsa_torch.train.errors import ConfigError
from tests.helpers import processes
from tests.helpers.colour_folder import COLOURS
from tests.helpers.runs import assert_same_run, elsewhere, interrupt_training, last, rows

SIDES = [(8, 20), (32, 32), (17, 9), (40, 12), (12, 12), (24, 40), (9, 30), (16, 16)]


@pytest.fixture
def native(config):
    """A run with images of eight sizes, 20 to 60 patches."""
    for folder in Path(config.data.root).glob("*/*"):
        for i, file in enumerate(sorted(folder.iterdir())):
            colour = np.array(COLOURS[folder.name], dtype=np.uint8)
            Image.fromarray(np.broadcast_to(colour, (*SIDES[i % 8], 3)).copy()).save(file)
    config.data = dataclasses.replace(config.data, native=True, max_tokens=220, crop_scale=(0.7, 1.0))
    config.optim.batch_size = 24
    return config


def test_a_run_trains_goes_on_exactly_is_evaluated_and_predicts(native, tmp_path):
    native.engine.accumulate, native.engine.save_steps = 2, 1
    whole = elsewhere(native, tmp_path / "whole")
    train(whole)
    assert all(np.isfinite(row["train_loss"]) for row in rows(whole))
    batches = last(whole)["progress"]["step"]  # of one epoch: two epochs of steps in two parts
    interrupt_training(native, batches + 3)  # in epoch 2, between the parts of its second step
    assert last(native)["progress"]["batch"] == 2
    train(native)
    assert_same_run(native, whole)

    result = evaluate_checkpoint(whole.output)
    alone = evaluate_checkpoint(whole.output, batch_size=1)
    assert (result.images, result.top1) == (12, alone.top1)
    assert result.loss == pytest.approx(alone.loss, rel=1e-5)
    fixed = dataclasses.replace(open_trained(whole.output).config.data, native=False)
    assert evaluate_checkpoint(whole.output, data=fixed).loss != pytest.approx(result.loss, rel=1e-3)
    output = tmp_path / "eval.json"
    cli.main(["eval", "--checkpoint", whole.output, "--max-image-tokens", "5", "--output", str(output)])
    shrunk = json.loads(output.read_text())["loss"]
    assert shrunk != pytest.approx(result.loss, rel=1e-3)


def test_models_trained_at_one_size_take_others(finished, tmp_path):
    config, output = finished[0], tmp_path / "found.json"
    image = Image.new("RGB", (90, 20), COLOURS["red"])
    image.putpixel((0, 0), (0, 0, 0))
    image.save(tmp_path / "wide.png")
    found = []
    for option in ([], ["--native"], ["--native", "--max-image-tokens", "10"]):
        command = ["predict", "--checkpoint", config.output, *option, "--output", str(output)]
        cli.main([*command, str(tmp_path / "wide.png")])
        prediction = json.loads(output.read_text())[0]
        found.append(dict(zip(prediction["classes"], prediction["probabilities"], strict=True))["red"])
    model = open_trained(config.output).fused()
    pixels = (np.asarray(image, dtype=np.float32) / 255 - model.spec.mean) / model.spec.std
    whole = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
    logits = model.model(whole).softmax(-1)[0]
    assert found[1] == pytest.approx(logits[model.class_names.index("red")].item(), rel=1e-4)
    assert len({round(share, 6) for share in found}) == 3
    output = tmp_path / "eval.json"
    cli.main(["eval", "--checkpoint", config.output, "--native", "--output", str(output)])
    assert json.loads(output.read_text())["top1"] == 1.0


def test_predicted_images_are_packed_within_the_budget_and_are_what_they_are_alone(
    finished, tmp_path, monkeypatch, capsys
):
    checkpoint, images = finished[0].output, []
    for i, (height, width) in enumerate([(8, 20), (32, 32), (16, 16), (9, 30)]):  # 11, 65, 17 and 25 tokens
        images.append(str(tmp_path / f"{i}.png"))
        Image.effect_noise((width, height), 50 * i + 10).convert("RGB").save(images[-1])
    images.insert(2, str(tmp_path / "bad.png"))
    Path(images[2]).write_bytes(b"no image")

    def predicted(*options):
        seen = []
        forward = WhiteBoxTransformer.forward
        monkeypatch.setattr(
            WhiteBoxTransformer, "forward", lambda model, x: seen.append(len(x)) or forward(model, x)
        )
        output = tmp_path / "found.json"
        command = ["predict", "--checkpoint", checkpoint, *options, "--on-bad-image", "skip"]
        assert cli.main([*command, "--output", str(output), *images]) == 0
        monkeypatch.undo()
        return json.loads(output.read_text()), seen

    (alone, one_by_one), (packed, in_parts) = (
        predicted("--native", "--max-tokens", tokens) for tokens in ("2", "93")
    )
    assert (one_by_one, in_parts) == ([1, 1, 1, 1], [3, 1])
    assert [row["error"] is None for row in packed] == [True, True, False, True, True]
    for ours, theirs in zip(packed, alone, strict=True):
        assert (ours["image"], ours["classes"]) == (theirs["image"], theirs["classes"])
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], rel=1e-4)
    assert cli.main(["predict", "--checkpoint", checkpoint, "--max-tokens", "99", images[0]]) == 1
    assert "max_tokens: only for images at their own size; add native" in capsys.readouterr().err


def test_processes_take_the_parts_of_a_step(native, tmp_path):
    """Two processes train as one with two parts of a step, although parts have other numbers of images."""
    next((tmp_path / "images" / "train" / "red").iterdir()).unlink()  # 23 images
    native.model.args["stem"] = "linear"  # no batch norm, which sees a part or all of it
    native.optim.name, native.optim.lr, native.optim.clip_grad = "sgd", 0.1, 1.0
    alone = elsewhere(native, tmp_path / "alone")
    alone.engine.accumulate = 2
    train(alone)
    processes.train(2, native)
    assert last(native)["progress"]["step"] == last(alone)["progress"]["step"] == 4
    for ours, theirs in zip(rows(native), rows(alone), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
    for name, tensor in last(native)["model"].items():
        torch.testing.assert_close(tensor, last(alone)["model"][name], atol=1e-5, rtol=1e-4, msg=name)


def test_what_cannot_work_is_refused(native):
    native.engine.compile = True
    with pytest.raises(ConfigError, match=r"engine\.compile must be off with data\.native"):
        train(native)
    native.engine.compile, native.engine.context_parallel = False, 2
    with pytest.raises(ConfigError, match=r"engine\.context_parallel must be 1 with data\.native.*got 2"):
        train(native)
    native.engine.context_parallel, native.data.max_image_tokens = 1, 1
    with pytest.raises(ConfigError, match=r"data\.max_image_tokens must be at least 2, got 1"):
        train(native)
    native.data.max_image_tokens, native.model.name = None, "vit_tiny_patch16_224"
    native.model.args = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    with pytest.raises(ConfigError, match=r"data\.native needs a model that takes images of several sizes"):
        train(native)
