"""Plain state dicts by the names that other packages give them, and their logits."""

from __future__ import annotations

import argparse

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torchvision.models import VisionTransformer

from cbsa_torch.models import from_pretrained
from cbsa_torch.models.checkpoint import CheckpointError, read_tensors
from cbsa_torch.models.hub import open_weights

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
"""Arguments of timm's ViTs."""
HF = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
HF |= {"layer_norm_eps": 1e-6, "initializer_range": 0.2}
NAME = "vit_tiny_patch16_224"
REGISTERS = {**SMALL, "reg_tokens": 4, "no_embed_class": True, "init_values": 1.0}


def randomised(model):
    """Every parameter random, so that none is told from another by its first value."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images(side=32):
    return torch.randn(2, 3, side, side)


def vit(**kwargs):
    return randomised(timm.create_model(NAME, **{**SMALL, "num_classes": 3, **kwargs}))


def saved(state, path):
    """A state dict in a file of either kind."""
    (save_file if path.suffix == ".safetensors" else torch.save)(
        {key: value.clone() for key, value in state.items()}, path
    )
    return path


def of_transformers(kind, config, **options):
    return randomised(getattr(transformers, kind)(getattr(transformers, config)(**HF, **options)))


# ---- timm's names


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model.", "module.model.", "encoder.net."])
@pytest.mark.parametrize("file", ["w.safetensors", "w.pth", "w.bin"])
def test_names_of_timm_after_any_prefix(tmp_path, prefix, file):
    model, x = vit(), images()
    path = saved({prefix + key: value for key, value in model.state_dict().items()}, tmp_path / file)
    read, info = open_weights(path, NAME, SMALL)
    torch.testing.assert_close(read(x), model(x), atol=0, rtol=0)
    assert info["model_args"] == {**SMALL, "num_classes": 3}
    assert info["notes"] == [f"{path} (names of timm): read into {NAME}, with a head for 3 classes"]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("cbt_pico_patch1_8", {"embed_dim": 16, "depth": 2, "num_heads": 2}),
        ("deit_tiny_distilled_patch16_224", SMALL),
        ("resnet18", {"num_classes": 5}),
        ("adapted_vit", {"base": NAME, "base_args": SMALL, "num_classes": 5}),
        ("segmenter", {"encoder": NAME, "encoder_args": SMALL, "num_classes": 5}),
    ],
)
def test_a_state_dict_of_any_model_of_timm(tmp_path, name, args):
    model = timm.create_model(name, **args).eval()
    x = torch.randn(2, *((1, 8, 8) if "pico" in name else (3, 32, 32)))
    read = from_pretrained(saved(model.state_dict(), tmp_path / "w.pth"), model=name, model_args=args)
    torch.testing.assert_close(read(x), model(x), atol=0, rtol=0)


def test_training_checkpoints_of_timm_give_the_average(tmp_path):
    """They keep the options of the command line, too."""
    model = vit()
    content = {"epoch": 3, "args": argparse.Namespace(lr=0.1, model=NAME), "state_dict": vit().state_dict()}
    torch.save({**content, "state_dict_ema": model.state_dict()}, tmp_path / "w.pth")
    x = images()
    torch.testing.assert_close(open_weights(tmp_path / "w.pth", NAME, SMALL)[0](x), model(x), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "eva02_tiny_patch14_224"])
def test_the_head_of_a_model_whose_name_has_none(tmp_path, name):
    """timm has DINOv2 and others without a head; who fine-tuned them has one."""
    model, x = randomised(timm.create_model(name, **SMALL, num_classes=3)), images()
    read, info = open_weights(saved(model.state_dict(), tmp_path / "w.pth"), name, SMALL)
    torch.testing.assert_close(read(x), model(x), atol=0, rtol=0)
    assert info["model_args"] == {**SMALL, "num_classes": 3}


def test_a_head_outside_the_encoder_belongs_to_it(tmp_path):
    model, x = vit(), images()
    state = {
        key if key.startswith("head.") else f"vit.{key}": value for key, value in model.state_dict().items()
    }
    read, _ = open_weights(saved({f"model.{k}": v for k, v in state.items()}, tmp_path / "w.pth"), NAME, SMALL)
    torch.testing.assert_close(read(x), model(x), atol=0, rtol=0)


# ---- transformers


def saved_as(spelling, source, folder):
    """What ``save_pretrained`` writes has the names of version 4, a state dict in memory those of version 5."""
    if spelling == "memory":
        return saved(source.state_dict(), folder / "w.pth")
    source.save_pretrained(folder)
    return folder / "model.safetensors"


@pytest.mark.parametrize("spelling", ["memory", "disk"])
@pytest.mark.parametrize(
    ("kind", "config", "name"),
    [
        ("ViTForImageClassification", "ViTConfig", NAME),
        ("DeiTForImageClassificationWithTeacher", "DeiTConfig", "deit_tiny_distilled_patch16_224"),
    ],
)
def test_classifiers_of_transformers(tmp_path, spelling, kind, config, name):
    source, x = of_transformers(kind, config, num_labels=3, intermediate_size=64), images()
    read, info = open_weights(saved_as(spelling, source, tmp_path), name, SMALL)
    torch.testing.assert_close(read(x), source(x).logits, atol=1e-5, rtol=1e-5)
    assert len(info["notes"]) == 1


ENCODERS = [
    ("ViTModel", "ViTConfig", {"intermediate_size": 64}, NAME, SMALL, "pooler.dense.bias, pooler.dense.weight"),
    ("Dinov2Model", "Dinov2Config", {}, NAME, {**SMALL, "init_values": 1.0}, "mask_token"),
    (
        "Dinov2Model",
        "Dinov2Config",
        {"use_swiglu_ffn": True},
        "vit_giant_patch14_dinov2",
        {**SMALL, "mlp_ratio": 96 / 16},
        "mask_token",
    ),
    ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {}, NAME, REGISTERS, "mask_token"),
]


@pytest.mark.parametrize("spelling", ["memory", "disk"])
@pytest.mark.parametrize(("kind", "config", "options", "name", "args", "left_out"), ENCODERS)
def test_encoders_of_transformers(tmp_path, spelling, kind, config, options, name, args, left_out):
    source, x = of_transformers(kind, config, **options), images()
    read, info = open_weights(saved_as(spelling, source, tmp_path), name, args)
    expected = source(x).last_hidden_state
    torch.testing.assert_close(read.forward_features(x), expected, atol=1e-4, rtol=1e-4)
    assert info["model_args"]["num_classes"] == 0
    assert left_out in info["notes"][1]


# ---- torchvision and the hubs


def test_torchvision(tmp_path):
    source, x = randomised(VisionTransformer(32, 8, 2, 2, 16, 64, num_classes=3)), images()
    read, info = open_weights(saved(source.state_dict(), tmp_path / "vit_b_16.pth"), NAME, SMALL)
    torch.testing.assert_close(read(x), source(x), atol=1e-5, rtol=1e-5)
    assert info["notes"][0].endswith(f"(names of torchvision): read into {NAME}, with a head for 3 classes")


HUB = {
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "embeddings.": "",
    "encoder.layer.": "blocks.",
    "layernorm": "norm",
    "attention.o_proj": "attn.proj",
    "layer_scale": "ls",
    "lambda1": "gamma",
    "down_proj": "w3",
}


def hub_names(source):
    """A state dict of transformers' DINOv2 with the names of ``vision_transformer.py`` in facebookresearch/dinov2."""
    hub = {}
    for key, value in source.state_dict().items():
        for theirs, hubs in HUB.items():
            key = key.replace(theirs, hubs)
        hub[key] = value
    for i in range(source.config.num_hidden_layers):
        for kind in ("weight", "bias"):
            parts = [hub.pop(f"blocks.{i}.attention.{part}_proj.{kind}") for part in "qkv"]
            hub[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            if source.config.use_swiglu_ffn:
                parts = [hub.pop(f"blocks.{i}.mlp.{part}_proj.{kind}") for part in ("gate", "up")]
                hub[f"blocks.{i}.mlp.w12.{kind}"] = torch.cat(parts)
    return hub


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"teacher": {f"backbone.{k}": v for k, v in state.items()}}]
)
@pytest.mark.parametrize(("kind", "config", "options", "name", "args", "left_out"), ENCODERS[1:])
def test_hub_of_dinov2(tmp_path, wrap, kind, config, options, name, args, left_out):
    source, x = of_transformers(kind, config, **options), images()
    torch.save(wrap(hub_names(source)), tmp_path / "dinov2_vits14_pretrain.pth")
    read, _ = open_weights(tmp_path / "dinov2_vits14_pretrain.pth", name, args)
    torch.testing.assert_close(read.forward_features(x), source(x).last_hidden_state, atol=1e-4, rtol=1e-4)


def test_hub_of_dino(tmp_path):
    """Its backbone has the names of timm; a checkpoint of its training keeps the head for DINO's own loss beside it.

    See ``vision_transformer.py`` and ``main_dino.py`` in facebookresearch/dino.
    """
    model, x = vit(num_classes=0), images()
    backbone = {f"module.backbone.{key}": value for key, value in model.state_dict().items()}
    own = {f"module.head.mlp.{i}.weight": torch.randn(16, 16) for i in (0, 2, 4)}
    own["module.head.last_layer.weight_v"] = torch.randn(8, 16)
    student = {key: torch.randn_like(value) for key, value in backbone.items()}
    torch.save({"student": student, "teacher": {**backbone, **own}, "epoch": 9}, tmp_path / "dino.pth")
    read, info = open_weights(tmp_path / "dino.pth", NAME, SMALL)
    torch.testing.assert_close(read(x), model(x), atol=0, rtol=0)
    assert "left out, as vit_tiny_patch16_224 has no place for it: head.last_layer.weight_v" in info["notes"][1]


# ---- other sizes


@pytest.mark.parametrize("side", [16, 64])
def test_the_image_size_is_that_of_the_weights(tmp_path, side):
    model = vit(img_size=side)
    path = saved(model.state_dict(), tmp_path / "w.pth")
    args = {key: value for key, value in SMALL.items() if key != "img_size"}
    read, info = open_weights(path, NAME, args)
    x = images(side)
    torch.testing.assert_close(read(x), model(x), atol=0, rtol=0)
    assert info["model_args"]["img_size"] == side


def test_positions_are_resampled_for_the_size_that_is_asked_for(tmp_path):
    model, x = vit(img_size=64), images(32)
    read, info = open_weights(saved(model.state_dict(), tmp_path / "w.pth"), NAME, SMALL)
    model.set_input_size(img_size=32)
    torch.testing.assert_close(read(x), model(x), atol=0, rtol=0)
    assert info["model_args"]["img_size"] == 32
    assert info["notes"][-1] == "images of 32 x 32 pixels, positions resampled from 65 to 17 tokens"


# ---- what is refused


def without(key):
    return lambda state: {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "args", "message"),
    [
        (without("norm.weight"), {}, "does not fit the model: missing norm.weight"),
        (lambda s: s, {"depth": 3}, r"missing blocks\.2\.norm1\.weight"),
        (lambda s: s, {"depth": 1}, r"unexpected blocks\.1\.norm1\.weight"),
        (
            lambda s: s,
            {"patch_size": 16},
            r"patch_embed\.proj\.weight has shape \(16, 3, 8, 8\), the model needs",
        ),
        (lambda s: s | {"blocks.0.ls1.gamma": torch.ones(16)}, {}, r"unexpected blocks\.0\.ls1\.gamma"),
        (lambda s: {"a": torch.ones(1)}, {}, f"holds nothing of {NAME}, but a; known are the names of timm"),
        (
            lambda s: {p + k: s[k] for p in ("model.", "teacher.") for k in s},
            {},
            r"as model\.\* and teacher\.\*",
        ),
        (
            lambda s: s | {"pos_embed": torch.ones(1, 19, 16)},
            {},
            "18 position embeddings are not a square grid; of 19, 1 are for tokens that .*: give img_size where",
        ),
        (lambda s: s, {"pretrained": True}, "must not hold pretrained"),
        (lambda s: s, {"no_such_option": 1}, "cannot build the model"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, args, message):
    path = saved(change(dict(vit().state_dict())), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_weights(path, NAME, SMALL | args)
    assert str(path) in str(caught.value)


def test_the_name_of_the_model_is_needed_and_must_be_one_of_timm(tmp_path):
    path = saved(vit().state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"plain state dict, which does not say of what model.*--model NAME"
    ):
        open_weights(path)
    with pytest.raises(
        CheckpointError, match=r"no model 'vit_tinny_patch16_224' in timm; did you mean 'vit_tiny"
    ):
        open_weights(path, "vit_tinny_patch16_224")
    with pytest.raises(CheckpointError, match="no model 'hf-hub:a/b' in timm"):
        open_weights(path, "hf-hub:a/b")


@pytest.mark.parametrize("part", ["attention.attention.key.weight", "attention.attention.value.bias"])
def test_a_part_of_a_projection_that_is_missing_is_named(tmp_path, part):
    of_transformers("ViTModel", "ViTConfig", intermediate_size=64).save_pretrained(tmp_path)
    state = read_tensors(tmp_path / "model.safetensors")
    path = saved(without(f"encoder.layer.1.{part}")(state), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"only some of the 3 parts of blocks\.1\.attn\.qkv"):
        open_weights(path, NAME, SMALL)


def test_a_head_that_reads_something_else_is_left_out(tmp_path):
    """DINOv2's classifier sees the class token beside the mean of the patches."""
    source = of_transformers("Dinov2ForImageClassification", "Dinov2Config", num_labels=3)
    path = saved(source.state_dict(), tmp_path / "w.pth")
    read, info = open_weights(path, NAME, {**SMALL, "init_values": 1.0})
    x = images()
    torch.testing.assert_close(
        read.forward_features(x), source.dinov2(x).last_hidden_state, atol=1e-4, rtol=1e-4
    )
    assert info["model_args"]["num_classes"] == 0
    assert "head.bias, head.weight" in info["notes"][1]
