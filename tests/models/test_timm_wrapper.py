"""Our timm models inside transformers: TimmWrapper, Trainer and pipeline, from a local folder."""

import pytest
import timm
import torch
import transformers
from PIL import Image

from cbsa_torch.models import load_checkpoint, save_checkpoint
from cbsa_torch.models.registry import FAMILIES, model_name
from cbsa_torch.train.hub import save_for_hub
from tests.helpers.exports import SIZES

NAME = "cbt_nano_patch4_32"
SMALL = {"depth": 1, "embed_dim": 32, "num_heads": 2, "num_representatives": 4}
INPUT = {
    "input_size": [3, 32, 32],
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}
PICTURE = Image.new("RGB", (50, 70), (200, 30, 90))
BASE = {key: value for key, value in SIZES.items() if key != "img_size"}
MODELS = {
    **{family: (model_name(family, "tiny"), SIZES) for family in FAMILIES},
    "adapted": ("adapted_vit", {"base": "vit_tiny_patch16_224", "img_size": 32, "base_args": BASE}),
}


def wrapped(architecture, args):
    config = transformers.TimmWrapperConfig(
        architecture=architecture, num_labels=3, model_args=dict(args), pretrained_cfg=dict(INPUT)
    )
    return transformers.TimmWrapperForImageClassification(config)


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {"pixel_values": torch.full((3, 32, 32), i / 8), "labels": i % 3}


def test_trained_saved_and_asked_by_a_pipeline(tmp_path):
    torch.manual_seed(0)
    model = wrapped(NAME, SMALL)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    result = transformers.Trainer(model, args, train_dataset=Data()).train()
    assert result.global_step == 3
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    model.eval().save_pretrained(tmp_path / "model")
    pipe = transformers.pipeline("image-classification", str(tmp_path / "model"), top_k=3)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(pipe.model(images).logits, model(images).logits, rtol=0, atol=0)
    pixels = pipe.image_processor(PICTURE, return_tensors="pt")["pixel_values"]
    expected = model(pixels).logits.softmax(-1)[0]
    for answer in pipe(PICTURE):
        index = int(answer["label"].removeprefix("LABEL_"))
        torch.testing.assert_close(
            torch.tensor(answer["score"]), expected[index].detach(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    model = wrapped(*MODELS[name]).eval()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    logits = again(images).logits
    assert torch.equal(logits, model(images).logits)
    assert torch.equal(logits, model.timm_model(images))


def test_masks_are_no_classes(tmp_path):
    args = {"encoder": "cbt_tiny_patch16_224", "encoder_args": SIZES, "depth": 1, "num_heads": 2}
    wrapped("segmenter", args).save_pretrained(tmp_path)
    pipe = transformers.pipeline("image-classification", str(tmp_path))
    with pytest.raises(ValueError, match="can only convert an array of size 1"):
        pipe(PICTURE)


def test_masks_are_trained_with_a_loss_of_ones_own(tmp_path):
    """That of TimmWrapperForImageClassification takes masks for classes."""
    args = {"encoder": "cbt_tiny_patch16_224", "encoder_args": SIZES, "depth": 1, "num_heads": 2}
    model, found = wrapped("segmenter", args), []

    class Masks(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return {"pixel_values": torch.full((3, 32, 32), i / 2), "labels": torch.full((32, 32), i)}

    def loss_of(outputs, labels, num_items_in_batch=None):
        found.append((outputs.logits, labels))
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    options = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    result = transformers.Trainer(model, options, train_dataset=Masks(), compute_loss_func=loss_of).train()
    ((masks, labels),) = found
    assert masks.shape == (2, 3, 32, 32)
    assert result.training_loss == pytest.approx(
        torch.nn.functional.cross_entropy(masks, labels).item(), abs=1e-4
    )


def test_the_files_we_publish_are_read_by_a_pipeline(tmp_path):
    torch.manual_seed(0)
    args = {**SMALL, "num_classes": 3}
    info = {"model": NAME, "model_args": args, "class_names": ["cat", "dog", "owl"], "input": INPUT}
    save_checkpoint(tmp_path / "weights.safetensors", timm.create_model(NAME, **args), info)
    model, info = load_checkpoint(tmp_path / "weights.safetensors")
    save_for_hub(tmp_path / "published", model, info, card="")
    pipe = transformers.pipeline("image-classification", str(tmp_path / "published"), top_k=3)
    assert {answer["label"] for answer in pipe(PICTURE)} == {"cat", "dog", "owl"}
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(pipe.model(images).logits, model.eval()(images), rtol=0, atol=0)
