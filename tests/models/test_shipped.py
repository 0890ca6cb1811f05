"""Weights that come with the package: the model that they say they are, without a network, and as good as recorded."""

import json
import socket

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import save_for_hf

from cbsa_torch.interpret import certificate
from cbsa_torch.models import from_pretrained, load_checkpoint
from cbsa_torch.models.shipped import FOLDER, SHIPPED, WEIGHTS
from cbsa_torch.nn import MSSA
from cbsa_torch.train.data.arrays import open_digits
from cbsa_torch.train.evaluate import evaluate_checkpoint

NAME = "cbt_pico_patch1_8.certified_digits"
each_one = pytest.mark.parametrize("name", SHIPPED)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    connect = socket.socket.connect

    def refuse(self, address):
        assert self.family == socket.AF_UNIX, f"asked the network: {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


def pretrained(**args):
    return timm.create_model(NAME, pretrained=True, **args).eval()


def held_out(count=8):
    """The first test images as the model is fed them, and their labels."""
    splits, _ = open_digits("L")
    test = splits["test"]
    images = torch.from_numpy(test.pixels[:count]).float()[:, None] / 255
    return (images - 0.5) / 0.5, torch.from_numpy(test.labels[:count])


@each_one
def test_its_accuracy_is_that_of_its_record(name, tmp_path):
    shipped = SHIPPED[name]
    record = json.loads((shipped.folder / "eval_test.json").read_text())
    result = evaluate_checkpoint(name, output=tmp_path / "eval.json")
    assert result.images == record["images"] == 360
    assert result.record()["confusion"] == record["confusion"]
    assert result.top1 == pytest.approx(record["top1"], abs=1e-9)
    assert record["top1"] > 0.98


def test_by_timm_it_is_the_same_model():
    images, labels = held_out(360)
    model = pretrained()
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(logits, from_pretrained(NAME)(images))
    assert (logits.argmax(1) == labels).double().mean() == pytest.approx(
        json.loads((SHIPPED[NAME].folder / "eval_test.json").read_text())["top1"], abs=1e-6
    )
    assert certificate(model, images[:16]).holding == 16 * 4 * 4


@each_one
def test_its_configuration_is_that_of_its_run(name):
    shipped = SHIPPED[name]
    model = timm.create_model(name, pretrained=True)
    _, info = load_checkpoint(shipped.folder / WEIGHTS)
    assert info["model"] == shipped.architecture
    assert info["model_args"] == {**shipped.form, "num_classes": model.num_classes}
    assert info["class_names"] == list(model.pretrained_cfg["label_names"])
    config = resolve_model_data_config(model)
    assert {
        key: list(value) if isinstance(value, tuple) else value for key, value in config.items()
    }.items() >= {
        key: info["input"][key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")
    }.items()
    assert "root" not in info["config"]["data"]  # nothing of the machine


def test_timm_lists_it():
    assert timm.list_pretrained("*cbt*") == [NAME]
    assert timm.is_model_pretrained(NAME)
    assert not timm.is_model_pretrained("cbt_pico_patch1_8")
    assert set(timm.list_models("cbt_pico*", include_tags=True)) == {NAME, "cbt_pico_patch1_8.untrained"}


def test_the_tag_says_the_form_and_the_plain_name_does_not():
    untrained = timm.create_model(NAME)
    assert {block.attn.step for block in untrained.blocks} == {"certified"}
    assert not torch.equal(untrained.head.weight, pretrained().head.weight)
    plain = timm.create_model("cbt_pico_patch1_8")
    assert {block.attn.step for block in plain.blocks} == {"free"}
    assert plain.pretrained_cfg["tag"] == "untrained"
    assert {b.attn.step for b in timm.create_model("cbt_pico_patch1_8.untrained").blocks} == {"free"}
    free = timm.create_model(NAME, step="free")  # without weights every form can be had
    assert free.blocks[0].attn.step == "free"


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("cbt_pico_patch1_8", {}),
        ("cbt_pico_patch1_8.untrained", {}),
        ("crate_tiny_patch16_224", {}),
        ("token_set_cbt_tiny", {"in_dim": 8}),
        ("segmenter", {"encoder": "cbt_nano_patch4_32", "num_classes": 2}),
        ("adapted_vit", {"base": "test_vit"}),
    ],
)
def test_without_weights_the_error_says_which_have_some(name, args):
    with pytest.raises(RuntimeError, match=rf"no trained weights of {name.partition('.')[0]}\. .*{NAME}"):
        timm.create_model(name, pretrained=True, **args)
    timm.create_model(name, **args)


def test_an_unknown_tag_is_refused():
    for weights in (True, False):
        with pytest.raises(RuntimeError, match="tag"):
            timm.create_model("cbt_pico_patch1_8.digits", pretrained=weights)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"step": "free"}, f"step must be 'certified' or left out beside the weights {NAME}.*got 'free'"),
        ({"mixer": MSSA}, "mixer must be left out"),
        ({"step": "free", "num_classes": 3}, "step must be 'certified'"),  # which timm would load in part
    ],
)
def test_weights_go_into_no_other_form(args, message):
    with pytest.raises(ValueError, match=message):
        pretrained(**args)


def test_other_classes_get_a_new_head():
    whole = pretrained()
    for count in (3, 0):
        other = pretrained(num_classes=count)
        assert other.num_classes == count
        kept = {name: p for name, p in other.named_parameters() if not name.startswith("head.")}
        assert all(torch.equal(p, whole.get_parameter(name)) for name, p in kept.items())
    images, _ = held_out()
    assert torch.equal(
        pretrained(num_classes=0)(images), whole.forward_head(whole.forward_features(images), pre_logits=True)
    )


def test_other_sizes_get_resampled_positions():
    model, images = pretrained(img_size=12), held_out()[0]
    assert model.pos_embed.shape[1] == 1 + 12 * 12
    assert torch.equal(model.pos_embed[:, :1], pretrained().pos_embed[:, :1])
    larger = torch.nn.functional.interpolate(images, (12, 12), mode="bicubic", antialias=True)
    assert torch.equal(model(larger), pretrained()(larger))  # which resamples them at every call


def test_colours_take_the_weights_of_grey_where_timm_can_convert_them():
    grey, colour = dict(pretrained().named_parameters()), pretrained(in_chans=3)
    other = {name for name, p in colour.named_parameters() if not torch.equal(p, grey[name])}
    assert other == {"stem.proj.0.0.weight"}


def test_timm_saves_and_opens_it_again(tmp_path):
    model = pretrained(num_classes=3)
    save_for_hf(model, tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert str(FOLDER) not in text
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images, _ = held_out()
    assert torch.equal(again(images), model(images))


def test_features_alone():
    features = timm.create_model(NAME, pretrained=True, features_only=True, out_indices=(3,)).eval()
    images, _ = held_out()
    (found,) = features(images)
    (expected,) = pretrained().forward_intermediates(images, indices=[3], intermediates_only=True)
    assert torch.equal(found, expected)


def test_the_package_stays_small():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 600_000
    assert {path.parent.name for path in files} == set(SHIPPED)
