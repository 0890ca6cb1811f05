"""Weights of others, given to the commands: plain state dicts of timm and transformers."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from cbsa_torch.cli import main
from cbsa_torch.models import load_checkpoint
from cbsa_torch.train.data import input_spec
from cbsa_torch.train.tasks.base import eval_transform
from tests.helpers.masked_folder import write_masked_folder

NAME = "vit_tiny_patch16_224"
SMALLEST = "test_vit"
"""timm's own ViT for tests: 6 layers of 64 channels."""
ARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
MODEL_ARGS = ["--model.args", *(str(part) for pair in ARGS.items() for part in pair)]
QUICK = [
    *("--optim.epochs", "1", "--optim.batch-size", "8", "--optim.warmup-epochs", "0", "--data.workers", "0"),
    *("--optim.lr", "1e-9", "--optim.weight-decay", "0", "--engine.cpu", "--engine.tracker", "none"),
]


def write_vit(path, **kwargs):
    """Weights of a small ViT by the names of timm."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, **{**ARGS, "img_size": 32, "num_classes": 3, **kwargs})
    save_file(model.state_dict(), path)
    return model


def write_transformers(folder, **sizes):
    config = transformers.ViTConfig(**{"image_size": 32, "patch_size": 8, **sizes})
    model = transformers.ViTModel(config)
    model.save_pretrained(folder)
    return model


def trained_weights(folder):
    return load_checkpoint(folder / "model.safetensors")


@pytest.mark.parametrize(("side", "classes"), [(32, 3), (64, 3), (32, 7)])
def test_init_from(tmp_path, colour_images, capfd, side, classes):
    """The rate is so low that what was trained is what was read."""
    source = write_vit(tmp_path / "vit.safetensors", img_size=side, num_classes=classes)
    folder = ["--config", "folder", "--data.root", str(colour_images), "--output", str(tmp_path / "run")]
    options = [
        "--model",
        NAME,
        "--model.init-from",
        str(tmp_path / "vit.safetensors"),
        "--model.image-size",
        "32",
    ]
    assert main(["train", *folder, *options, *MODEL_ARGS, *QUICK]) == 0
    model, _ = trained_weights(tmp_path / "run")
    out = capfd.readouterr().out
    assert f"(names of timm): read into {NAME}, with a head for {classes} classes" in out
    assert ("new head for 3 classes (the weights have 7)" in out) == (classes == 7)
    assert ("positions resampled from 65 to 17 tokens" in out) == (side == 64)
    source.set_input_size(img_size=32)
    expected, found = source.state_dict(), model.state_dict()
    compared = [name for name in expected if classes == 3 or not name.startswith("head.")]
    for name in compared:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4)
    assert len(compared) == len(expected) - 2 * (classes != 3)


def test_adapt(tmp_path, colour_images, capfd):
    """A released encoder without a head, as transformers saves it."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 192}
    write_transformers(tmp_path / "vit", **sizes, patch_size=16)
    options = ["--model", SMALLEST, "--weights", str(tmp_path / "vit"), "--model.image-size", "32"]
    data = ["--data", "folder", "--data.root", str(colour_images), "--output", str(tmp_path / "run")]
    assert main(["adapt", *options, *data, *QUICK, "--new-lr", "1e-9"]) == 0
    out = capfd.readouterr().out
    assert f"(names of transformers): read into {SMALLEST}, without a head" in out
    assert "new head for 3 classes" in out
    assert "6 of 6 attention layers are now 'adapted_cbsa'" in out
    theirs = load_file(tmp_path / "vit" / "model.safetensors")
    model, info = trained_weights(tmp_path / "run")
    value = model.state_dict()["blocks.3.attn.qkv.weight"][-64:]
    torch.testing.assert_close(
        value, theirs["encoder.layer.3.attention.attention.value.weight"], atol=1e-6, rtol=1e-4
    )
    assert (info["model_args"]["base"], info["model_args"]["img_size"]) == (SMALLEST, 32)


def test_adapt_in_stages_has_the_given_weights_for_its_teacher(tmp_path, colour_images, capfd):
    save_file(
        timm.create_model(SMALLEST, img_size=32, num_classes=3).state_dict(), tmp_path / "vit.safetensors"
    )
    options = ["--model", SMALLEST, "--weights", str(tmp_path / "vit.safetensors"), "--stage-epochs", "1"]
    data = ["--data", "folder", "--data.root", str(colour_images), "--output", str(tmp_path / "run")]
    assert main(["adapt", *options, *data, *QUICK, "--model.layers", "4,5", "--distill.logits", "1"]) == 0
    assert capfd.readouterr().out.count("stage 2 of 2") == 1


def test_encoder_from(tmp_path, capfd):
    write_vit(tmp_path / "vit.safetensors", img_size=64)
    root = write_masked_folder(tmp_path / "scenes")
    weights = ["--model.encoder-from", str(tmp_path / "vit.safetensors"), "--model.image-size", "32"]
    args = ["--model.args", "encoder", NAME, "encoder_args", json.dumps(ARGS), "depth", "1", "num_heads", "1"]
    (tmp_path / "seg.yaml").write_text("task: segmentation\n")
    data = ["--data.root", str(root), "--data.crop-size", "32", "--output", str(tmp_path / "run")]
    options = [option for option in QUICK if option != "8"]
    options.insert(options.index("--optim.batch-size") + 1, "4")
    assert main(["train", "--config", str(tmp_path / "seg.yaml"), *weights, *args, *data, *options]) == 0
    out = capfd.readouterr().out
    assert f"read into {NAME}, with a head for 3 classes" in out
    assert "images of 32 x 32 pixels, positions resampled from 65 to 17 tokens" in out
    theirs = load_file(tmp_path / "vit.safetensors")
    model, _ = trained_weights(tmp_path / "run")
    torch.testing.assert_close(
        model.encoder.state_dict()["blocks.1.mlp.fc1.weight"],
        theirs["blocks.1.mlp.fc1.weight"],
        atol=1e-6,
        rtol=1e-4,
    )


# ---- eval, report and predict


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
    """Weights of timm's smallest ViT for images of 32 pixels, with a head for three classes."""
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    model = timm.create_model(NAME, img_size=32, num_classes=3)
    save_file(model.state_dict(), path)
    return path


@pytest.mark.parametrize("split", ["test", "val"])
def test_eval(tmp_path, tiny_vit, colour_images, capsys, split):
    options = ["--checkpoint", str(tiny_vit), "--model", NAME, "--root", str(colour_images), "--split", split]
    assert main(["eval", *options, "--output", str(tmp_path / "eval.json")]) == 0
    record = json.loads((tmp_path / "eval.json").read_text())
    assert (record["images"], record["class_names"]) == (12, ["blue", "green", "red"])
    out = capsys.readouterr().out
    assert "its outputs are taken for the 3 classes of the data in their order: blue, green, red" in out
    assert "images are fed as 32 x 32 pixels, mean (0.5, 0.5, 0.5)" in out


def test_predict(tmp_path, tiny_vit, colour_images, capsys):
    """Of weights whose model has arguments that its name does not say, with the classes of a folder without train."""
    model = timm.create_model(NAME, img_size=32, num_classes=3, global_pool="avg", fc_norm=False).eval()
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    shutil.copytree(colour_images / "test", tmp_path / "classes" / "test")
    image = next((tmp_path / "classes" / "test" / "red").iterdir())
    plain = [
        "--checkpoint",
        str(tmp_path / "vit.safetensors"),
        "--model",
        NAME,
        "--root",
        str(tmp_path / "classes"),
    ]
    args = ["--args", "global_pool", "avg", "fc_norm", "no"]
    assert main(["predict", str(image), *plain, *args, "--output", str(tmp_path / "p.json")]) == 0
    (record,) = json.loads((tmp_path / "p.json").read_text())
    made = model(eval_transform(input_spec(model, 32))(Image.open(image).convert("RGB"))[None]).softmax(-1)[0]
    order = made.argsort(descending=True)
    assert record["classes"] == [["blue", "green", "red"][i] for i in order]
    torch.testing.assert_close(torch.tensor(record["probabilities"]), made[order], atol=1e-5, rtol=0)
    assert main(["eval", *plain, *args, "--output", str(tmp_path / "e.json")]) == 0
    assert "images are fed as 32 x 32 pixels" in capsys.readouterr().out


def test_a_run_says_its_classes_itself(tmp_path, colour_images, capfd):
    options = ["--model", "cbt_nano_patch4_32", "--config", "folder", "--data.root", str(colour_images)]
    tiny = ["--model.args", "embed_dim", "16", "depth", "1", "num_heads", "2"]
    assert main(["train", *options, *tiny, *QUICK, "--output", str(tmp_path / "run")]) == 0
    image = next((colour_images / "test" / "red").iterdir())
    assert (
        main(["predict", str(image), "--checkpoint", str(tmp_path / "run"), "--root", str(colour_images)]) == 1
    )
    assert "says its classes: leave out --root and --data" in capfd.readouterr().err


def test_report(tmp_path, tiny_vit, colour_images, capsys):
    weights = tmp_path / "vit.safetensors"
    weights.write_bytes(tiny_vit.read_bytes())
    options = ["--checkpoint", str(weights), "--model", NAME, "--root", str(colour_images)]
    assert main(["report", *options, "--images", "4", "--shown", "1", "--robustness-images", "0"]) == 0
    assert "blue" in (tmp_path / "report.html").read_text()
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "plain state dict, which does not say of what model it is"),
        (["--model", NAME], "does not say its classes: cbsa eval, predict and report take such a file"),
        (["--model", "resnet18"], "holds nothing of resnet18"),
        (["--model", NAME, "--data", "digits"], "a head for 3 classes, and the data have 10 classes"),
    ],
)
def test_what_is_missing_for_an_evaluation_is_said(tiny_vit, capsys, options, message):
    assert main(["eval", "--checkpoint", str(tiny_vit), *options]) == 1
    assert message in capsys.readouterr().err
