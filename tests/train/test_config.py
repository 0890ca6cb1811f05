from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from cbsa_torch.train.build import build_model
from cbsa_torch.train.config import (
    ModelConfig,
    TrainConfig,
    check_config,
    check_images,
    dump_yaml,
    from_dict,
    to_dict,
)
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.registry import load_config, recipe_names


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_load_and_pass_the_checks(name):
    check_config(load_config(name))


def test_the_recipes_are_those_documented():
    assert recipe_names() == [
        "animals28", "animals28_vit", "digits", "emoji64", "emoji64_vit", "emoji_scenes", "finetune_cifar10",
        "finetune_cifar100", "finetune_flowers102", "finetune_folder", "finetune_pets", "folder", "imagenet", "segmenter_ade20k",
    ]  # fmt: skip


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = load_config("digits")
    config.model.args = {"embed_dim": "16", "tied": "true"}
    config.data.crop_scale = (0.25, 0.75)
    config.engine.precision = "bf16"
    assert load_config(write(tmp_path, dump_yaml(config))) == config


def test_no_keys_at_all_give_the_defaults_but_an_empty_file_is_refused(tmp_path):
    assert load_config(write(tmp_path, "{}")) == TrainConfig()
    for text in ("", "# a comment\n", "null"):
        with pytest.raises(ConfigError, match=r"config\.yaml is empty"):
            load_config(write(tmp_path, text))


def test_a_dictionary_reads_back_equal():
    config = load_config("imagenet")
    assert from_dict(TrainConfig, to_dict(config), "here") == config


def test_an_unknown_key_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key 'sed' in .*; did you mean 'seed'\?"):
        load_config(write(tmp_path, "sed: 1"))


def test_an_unknown_nested_key_names_the_nearest_and_its_section(tmp_path):
    with pytest.raises(ConfigError, match=r"'weight_decy' in .*optim; did you mean 'weight_decay'\?"):
        load_config(write(tmp_path, "optim:\n  weight_decy: 0.1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: two", "seed must be int, got 'two'"),
        ("seed: 1.5", "seed must be int"),
        ("seed: true", "seed must be int"),
        ("resume: 1", "resume must be bool"),
        ("output: 3", "output must be str"),
        ("optim: 3", "optim must be a mapping"),
        ("- optim", "must be a mapping of keys to values, got list"),
        ("optim:\n  lr: fast", "lr must be float, got 'fast'"),
        ("optim:\n  lr: true", "lr must be float"),
        ("data:\n  crop_scale: 0.5", "crop_scale must be 2 values"),
        ("data:\n  crop_scale: [0.1, 0.2, 0.3]", "crop_scale must be 2 values"),
        ("data:\n  crop_scale: [a, b]", "crop_scale must be float"),
        ("data:\n  max_bad_images: many", "max_bad_images must be int"),
        ("optim:\n  keep: bes", "must be one of 'best', 'last', got 'bes'; did you mean 'best'"),
        ("engine:\n  precision: fp8", "precision must be one of"),
        ("model:\n  args: [1]", "args must be a mapping"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(write(tmp_path, text))


def test_broken_yaml_is_refused_with_the_file_name(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.yaml is not valid YAML"):
        load_config(write(tmp_path, "optim: [1, 2"))


def test_floats_may_be_written_without_a_dot(tmp_path):
    config = load_config(write(tmp_path, "optim:\n  lr: 1e-3\n  warmup_epochs: 5\n  clip_grad: 1"))
    assert (config.optim.lr, config.optim.warmup_epochs, config.optim.clip_grad) == (1e-3, 5.0, 1.0)
    assert type(config.optim.clip_grad) is float


def test_optional_values_may_be_null(tmp_path):
    config = load_config(write(tmp_path, "optim:\n  ema_decay: null\nmodel:\n  image_size: null"))
    assert config.optim.ema_decay is None
    assert config.model.image_size is None


@pytest.mark.parametrize("text", ["no", "'no'"])
def test_precision_no_needs_no_quotes(tmp_path, text):
    assert load_config(write(tmp_path, f"engine:\n  precision: {text}")).engine.precision == "no"


def test_model_arguments_become_strings_that_yaml_reads_back(tmp_path):
    config = load_config(write(tmp_path, "model:\n  args: {depth: 2, tied: true, contraction: exact}"))
    assert config.model.args == {"depth": "2", "tied": "true", "contraction": "exact"}


def test_lists_and_mappings_as_model_arguments_are_kept_whole():
    values = {"img_size": [32, 48], "options": {"a": 1, "b": [2, 3]}, "long": list(range(99)), "none": None}
    args = ModelConfig(args=values).args
    assert {key: yaml.safe_load(text) for key, text in args.items()} == values


def test_model_arguments_may_be_values_of_python(tmp_path):
    values = {"depth": 2, "tied": True, "mlp_ratio": 0.5, "contraction": "exact"}
    config = TrainConfig(model=ModelConfig(args=values))
    assert config.model.args == {"depth": "2", "tied": "true", "mlp_ratio": "0.5", "contraction": "exact"}
    config.model.args["depth"] = 3
    assert load_config(write(tmp_path, dump_yaml(config))).model.args["depth"] == "3"
    config.model.name, config.model.args = "cbt_pico_patch1_8", {"depth": 1, "tied": True, "embed_dim": "32"}
    model, built = build_model(config, 3)
    assert built == {"depth": 1, "tied": True, "embed_dim": 32, "num_classes": 3}
    assert len(model.blocks) == 1


def test_a_missing_file_names_the_recipes_and_the_nearest():
    with pytest.raises(
        ConfigError, match=r"'digit'.*digits, emoji64, emoji64_vit, emoji_scenes, .*did you mean 'digits'"
    ):
        load_config("digit")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optim", "batch_size", 0),
        ("optim", "epochs", 0),
        ("optim", "lr", 0.0),
        ("optim", "lr", float("nan")),
        ("optim", "weight_decay", -0.1),
        ("optim", "warmup_epochs", -1.0),
        ("optim", "label_smoothing", 1.0),
        ("optim", "ema_decay", 1.0),
        ("data", "val_fraction", 0.0),
        ("data", "val_fraction", 1.0),
        ("data", "crop_scale", (0.5, 0.1)),
        ("data", "crop_scale", (0.0, 1.0)),
        ("data", "crop_ratio", (0.0, 1.0)),
        ("data", "hflip", 1.5),
        ("data", "workers", -1),
        ("data", "max_bad_images", -1),
        ("data", "rotate", -1.0),
        ("data", "shift", 2.0),
        ("optim", "min_lr", -1.0),
        ("optim", "min_lr", 1.0),
        ("optim", "warmup_lr", -1.0),
        ("optim", "clip_grad", 0.0),
        ("engine", "accumulate", 0),
        ("engine", "threads", 0),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(section, key, value):
    config = TrainConfig()
    setattr(config, section, dataclasses.replace(getattr(config, section), **{key: value}))
    with pytest.raises(ConfigError, match=rf"{section}\.{key} must .*, got "):
        check_config(config)
        check_images(config.data)


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(ConfigError, match="resume and overwrite exclude each other"):
        check_config(TrainConfig(resume=True, overwrite=True))
