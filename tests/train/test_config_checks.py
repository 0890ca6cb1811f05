"""Values that cannot work are refused with the name of their key, before the folder is touched."""

import dataclasses
import re

import pytest

from cbsa_torch.train.config import TrainConfig, check_config, check_image_settings
from cbsa_torch.train.errors import ConfigError
from tests.helpers.runs import assert_refused

FLOATS = [
    (section.name, item.name)
    for section in dataclasses.fields(TrainConfig)
    if dataclasses.is_dataclass(section.default_factory)
    for item in dataclasses.fields(section.default_factory)
    if "float" in item.type and not item.type.startswith("dict")
]


def changed(config, section, **values):
    setattr(config, section, dataclasses.replace(getattr(config, section), **values))
    return config


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("section", "key"), FLOATS)
def test_numbers_that_are_none_are_refused(section, key, value):
    config = TrainConfig()
    value = (value, 1.0) if isinstance(getattr(getattr(config, section), key), tuple) else value
    with pytest.raises(ConfigError, match=rf"^{section}\.{key} must be finite, got "):
        check_config(changed(config, section, **{key: value}))


def test_every_section_has_floats_that_are_checked():
    assert len(FLOATS) > 12
    assert {section for section, _ in FLOATS} == {"data", "optim"}


@pytest.mark.parametrize("seed", [-1, 2**31, 2**64])
def test_seeds_that_no_generator_takes_are_refused(config, seed):
    config.seed = seed
    assert_refused(config, ConfigError, re.escape(f"seed must be in [0, 2**31), got {seed}"))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"color_jitter": -0.1}, "data.color_jitter must be in [0, 10], got -0.1"),
        ("data", {"color_jitter": 1e40}, "data.color_jitter must be in [0, 10]"),
        ("data", {"workers": 10**6}, "data.workers must be in [0, 1024]"),
        ("data", {"auto_augment": "rand-foo"}, "data.auto_augment 'rand-foo' has a section 'foo'"),
        ("engine", {"threads": 2**40}, "engine.threads must be in [1, 4096]"),
        ("engine", {"accumulate": 3}, "batch_size (8) must be divisible by"),
        ("engine", {"precision": "fp16"}, "engine.precision fp16 needs a GPU"),  # Accelerate would use float32
        ("engine", {"fsdp": True}, "engine.fsdp needs several processes"),
        ("model", {"image_size": 0}, "model.image_size must be at least 1, got 0"),
        ("model", {"image_size": -5}, "model.image_size must be at least 1, got -5"),
        ("model", {"args": {"num_classes": 7}}, "model.args num_classes must be left out (the data gives"),
        ("model", {"image_size": 32, "args": {"img_size": 64}}, "img_size must be left out beside model.image"),
        ("model", {"name": "cbt_nano_patch4_23"}, "did you mean 'cbt_nano_patch4_"),
        ("model", {"args": {"no_such_option": 1}}, "cannot build cbt_nano_patch4_32 with"),
        ("optim", {"name": "lyon"}, "must be an optimiser of timm, got 'lyon'; did you mean 'lion'?"),
        ("optim", {"name": "adahessian"}, "optim.name 'adahessian' cannot be used here"),
        ("optim", {"name": "bnbadam"}, "optim.name 'bnbadam' cannot be used here"),
    ],
)
def test_values_out_of_range_are_refused_before_the_folder(config, section, values, message):
    assert_refused(changed(config, section, **values), ConfigError, re.escape(message))


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
    config = changed(TrainConfig(), section, **{key: value})
    with pytest.raises(ConfigError, match=rf"{section}\.{key} must .*, got "):
        check_config(config)
        check_image_settings(config.data)


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(ConfigError, match="resume and overwrite exclude each other"):
        check_config(TrainConfig(resume=True, overwrite=True))
