from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cbsa_torch.cli import main
from cbsa_torch.train.build import build_model, read_args
from cbsa_torch.train.config import ModelConfig, TrainConfig, dump_yaml, from_dict, read_yaml
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.registry import load_config


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = load_config("digits")
    config.model.args = {"embed_dim": "16", "tied": "true"}
    config.data.crop_scale = (0.25, 0.75)
    config.engine.precision = "bf16"
    assert load_config(write(tmp_path, dump_yaml(config))) == config
    config = load_config("emoji_scenes")
    config.data.mask_values = (0, 128, 255)
    assert load_config(write(tmp_path, dump_yaml(config))) == config


def test_no_keys_at_all_give_the_defaults_but_an_empty_file_is_refused(tmp_path):
    assert load_config(write(tmp_path, "{}")) == TrainConfig()
    for text in ("", "# a comment\n", "null"):
        with pytest.raises(ConfigError, match=r"config\.yaml is empty"):
            load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 1", "config.yaml; did you mean 'seed'?"),
        ("optim:\n  weight_decy: 0.1", "optim; did you mean 'weight_decay'?"),
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
        ("task: segmentation\ndata:\n  mask_values: 255", "mask_values must be a list of values, got 255"),
        ("task: segmentation\ndata:\n  mask_values: [0, 1.5]", "mask_values must be int, got 1.5"),
        ("optim:\n  keep: bes", "must be one of 'best', 'last', got 'bes'; did you mean 'best'"),
        ("engine:\n  precision: fp8", "precision must be one of"),
        ("model:\n  args: [1]", "args must be a mapping"),
    ],
)
def test_unknown_keys_and_values_of_another_type_are_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(write(tmp_path, text))


def test_floats_may_be_written_without_a_dot_and_optional_values_be_null(tmp_path):
    text = "optim:\n  lr: 1e-3\n  warmup_epochs: 5\n  clip_grad: 1\n  ema_decay: null"
    optim = load_config(write(tmp_path, text)).optim
    assert (optim.lr, optim.warmup_epochs, optim.clip_grad, optim.ema_decay) == (1e-3, 5.0, 1.0, None)
    assert type(optim.clip_grad) is float


@pytest.mark.parametrize("text", ["no", "'no'"])
def test_precision_no_needs_no_quotes(tmp_path, text):
    assert load_config(write(tmp_path, f"engine:\n  precision: {text}")).engine.precision == "no"


def test_lists_and_mappings_as_model_arguments_are_kept_whole():
    values = {"img_size": [32, 48], "options": {"a": 1, "b": [2, 3]}, "long": list(range(99)), "none": None}
    args = ModelConfig(args=values).args
    assert {key: yaml.safe_load(text) for key, text in args.items()} == values


def test_model_arguments_may_be_values_of_python_or_yaml(tmp_path):
    values = {"depth": 2, "tied": True, "mlp_ratio": 0.5, "contraction": "exact"}
    config = TrainConfig(model=ModelConfig(args=values))
    assert config.model.args == {"depth": "2", "tied": "true", "mlp_ratio": "0.5", "contraction": "exact"}
    text = "model:\n  args: {depth: 2, tied: true, mlp_ratio: 0.5, contraction: exact}"
    assert load_config(write(tmp_path, text)).model.args == config.model.args
    config.model.args["depth"] = 3
    assert load_config(write(tmp_path, dump_yaml(config))).model.args["depth"] == "3"
    config.model.name, config.model.args = "cbt_pico_patch1_8", {"depth": 1, "tied": True, "embed_dim": "32"}
    model, built, _ = build_model(config, 3)
    assert built == {"depth": 1, "tied": True, "embed_dim": 32, "num_classes": 3}
    assert len(model.blocks) == 1


def test_a_missing_file_names_the_recipes_and_the_nearest():
    with pytest.raises(
        ConfigError, match=r"'digit'.*digits, emoji64, emoji64_vit, emoji_scenes, .*did you mean 'digits'"
    ):
        load_config("digit")


BAD_FILES = {
    "latin-1": ("output: caf\xe9".encode("latin-1"), "is not a text file in UTF-8"),
    "binary": (bytes(range(256)), "is not a text file in UTF-8"),
    "cut short": (b"optim: [1, 2", "is not valid YAML"),
    "zeros": (b"\0" * 100, "is not valid YAML"),
    "date": (b"seed: 2020-13-45", "seed must be int, got '2020-13-45'"),
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


# ---- free-form values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-2", 0.01),
        ("+2E3", 2000.0),
        ("1e22", 1e22),
        (".5", 0.5),
        ("012", 12),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x1f", "0x1f"),
        ("None", None),
        ("null", None),
        ("none", "none"),
        ("true", True),
        ("softmax", "softmax"),
        ("e5", "e5"),
        (
            "{eps: 1e-2, sizes: [012, 1e1], of: {x: None}}",
            {"eps": 0.01, "sizes": [12, 10.0], "of": {"x": None}},
        ),
    ],
)
def test_free_values_are_read_as_typed_ones(text, value):
    """On the command line, in a file, inside a mapping, and after the configuration was written and read again."""
    read = read_args(ModelConfig(args={"x": text}))["x"]
    assert (read, type(read)) == (value, type(value))
    config = from_dict(TrainConfig, read_yaml(f"model: {{args: {{x: {text}}}}}", "here"), "here")
    assert read_args(config.model) == {"x": value}
    again = from_dict(TrainConfig, read_yaml(dump_yaml(config), "here"), "here")
    assert read_args(again.model) == {"x": value}


@pytest.mark.parametrize("text", ["[1", "9" * 5000, "[" * 20_000, "{a: }b"])
def test_a_free_value_that_is_none_is_named(text):
    with pytest.raises(ConfigError, match=r"model\.args x is not valid YAML"):
        read_args(ModelConfig(args={"x": text}))
