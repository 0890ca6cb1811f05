"""Values that cannot work are refused with the name of their key, before the folder is touched."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import AugmentOp

from cbsa_torch.cli import main
from cbsa_torch.train import load_config, train
from cbsa_torch.train.config.base import DataConfig, TrainConfig
from cbsa_torch.train.config.checks import check_config
from cbsa_torch.train.data import InputSpec, make_loader
from cbsa_torch.train.data.images import PlainImages
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.run.folder import RunFolder

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
    with pytest.raises(ConfigError, match=re.escape(f"seed must be in [0, 2**31), got {seed}")):
        train(config)
    assert not RunFolder(config.output).path.exists()


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"color_jitter": -0.1}, "data.color_jitter must be in [0, 10], got -0.1"),
        ("data", {"color_jitter": 1e40}, "data.color_jitter must be in [0, 10]"),
        ("data", {"workers": 10**6}, "data.workers must be in [0, 1024]"),
        ("engine", {"threads": 2**40}, "engine.threads must be in [1, 4096]"),
        ("model", {"image_size": 0}, "model.image_size must be at least 1, got 0"),
        ("model", {"image_size": -5}, "model.image_size must be at least 1, got -5"),
        ("model", {"args": {"num_classes": 7}}, "model.args num_classes must be left out (the data gives"),
        ("model", {"image_size": 32, "args": {"img_size": 64}}, "img_size must be left out beside model.image"),
        ("model", {"args": {"no_such_option": 1}}, "cannot build cbt_nano_patch4_32 with"),
        (
            "optim",
            {"name": "lyon"},
            "optim.name must be an optimiser of timm, got 'lyon'; did you mean 'lion'?",
        ),
        ("optim", {"name": "adahessian"}, "optim.name 'adahessian' cannot be used here"),
        ("optim", {"name": "bnbadam"}, "optim.name 'bnbadam' cannot be used here"),
    ],
)
def test_values_out_of_range_are_refused_before_the_folder(config, section, values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(changed(config, section, **values))
    assert not RunFolder(config.output).path.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with one of rand, augmix"),
        ("randm9", "must begin with one of"),
        ("rnad-m9", "did you mean 'rand'?"),
        ("rand-mnine", "unknown section 'mnine'; allowed: m<number>, n<number>"),
        ("rand-m9-foo", "unknown section 'foo'"),
        ("rand-m9-", "unknown section ''"),
        ("rand-x3", "unknown section 'x3'"),
        ("rand-m9-m8", "sets 'm' twice"),
        ("rand-m11", "m must be at most 10, to which timm clips it"),
        ("rand-m9.5", "m must be a whole number in [0, 30], got 9.5"),
        ("rand-n0", "n must be a whole number in [1, 9], got 0"),
        ("rand-p1.5", "p must be a number in [0, 1], got 1.5"),
        ("augmix-w0", "w must be a whole number"),
        ("original-m9", "unknown section 'm9'; allowed: mstd<number>"),
        ("v0-mstd1e5", "unknown section 'mstd1e5'"),
    ],
)
def test_strange_policies_are_refused_before_the_folder(config, text, message):
    with pytest.raises(ConfigError, match=f"data.auto_augment .*{re.escape(message)}"):
        train(changed(config, "data", auto_augment=text))
    assert not RunFolder(config.output).path.exists()


def operations(transform):
    """All of timm's operations in a transform, which draws a few for each image."""
    found = []
    for part in transform.transforms:
        found += getattr(part, "ops", [])
        found += [operation for pair in getattr(part, "policy", []) for operation in pair]
    assert all(isinstance(operation, AugmentOp) for operation in found)
    return found


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    "policy",
    ["rand-m9-mstd0.5", "rand-m10-inc1", "rand-m0", "rand-m30-mmax30-n3-p1-inc1", "rand-m9-tweights", "rand-t3a-m5",
     "rand-t3aw-m10-mstd101", "augmix-m10-w4-d2-a0.5-b1-mstd2", "augmix", "original", "originalr-mstd5", "v0",
     "v0r-mstd9", "3a-mstd0.5"],
)  # fmt: skip
def test_policies_that_are_accepted_work_at_the_ends_of_their_range(policy, mode):
    shape = (40, 30) if mode == "L" else (40, 30, 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    channels = 1 if mode == "L" else 3
    spec = InputSpec((channels, 32, 32), (0.5,) * channels, (0.5,) * channels, "bicubic", 1.0)
    config = DataConfig(auto_augment=policy, workers=0, shift=0.1)
    loader = make_loader(PlainImages([(image, 0)] * 4), spec, config, 4, train=True)
    assert next(iter(loader))[0].shape == (4, channels, 32, 32)
    parts = loader.dataset.transform.transforms[1].transforms
    found = operations(loader.dataset.transform.transforms[1])
    assert found, parts
    for operation in found:
        operation.prob, operation.magnitude_std = 1.0, 0
        for magnitude in {0, 10, operation.magnitude_max or 10}:
            operation.magnitude = magnitude
            assert operation(image).size == image.size


BAD_FILES = {
    "latin-1": ("output: caf\xe9".encode("latin-1"), "is not a text file in UTF-8"),
    "binary": (bytes(range(256)), "is not a text file in UTF-8"),
    "zeros": (b"\0" * 100, "is not valid YAML"),
    "date": (b"seed: 2020-13-45", "is not valid YAML"),
    "digits": (b"seed: " + b"9" * 5000, "is not valid YAML"),
    "beyond floats": (b"optim:\n  lr: " + b"9" * 400, "lr must be float"),
    "deep": (b"[" * 20_000, "is not valid YAML"),
    "list key": (b"? [1]\n: 2", "is not valid YAML"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_are_no_configuration_are_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "my.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"my.yaml.*{message}"):
        load_config(path)
    assert main(["train", "--config", str(path), "--output", str(tmp_path / "run")]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
