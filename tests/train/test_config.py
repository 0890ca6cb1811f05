from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from cbsa_torch.cli import main
from cbsa_torch.cli.train import read_options
from cbsa_torch.train.build import build_model
from cbsa_torch.train.config import ModelConfig, TrainConfig, dump_yaml, from_dict
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.free_form import read_yaml
from cbsa_torch.train.registry import load_config


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = load_config("digits")
    config.model.args = {"embed_dim": 16, "tied": True, "global_pool": "", "weight_init": "1e-2"}
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


def test_model_arguments_have_one_form(tmp_path):
    values = {"img_size": (32, 48), "options": {"a": 1, "b": [2, 3]}, "long": list(range(99)), "none": None}
    config = TrainConfig(model=ModelConfig(args=values))
    assert config.model.args == {**values, "img_size": [32, 48]}
    config.model.args["depth"] = 3
    assert load_config(write(tmp_path, dump_yaml(config))).model.args == config.model.args
    config.model.name, config.model.args = (
        "cbt_pico_patch1_8",
        {"depth": 1, "tied": True, "num_representatives": (2, 3)},
    )
    again = load_config(write(tmp_path, dump_yaml(config)))
    assert again.model == ModelConfig("cbt_pico_patch1_8", args=config.model.args)
    for written in (config, again):
        model, built, _ = build_model(written, 3)
        assert len(model.blocks) == 1
        assert model.blocks[0].attn.representatives.num_representatives == (2, 3)
    assert built == {"depth": 1, "tied": True, "num_representatives": [2, 3], "num_classes": 3}


def test_model_arguments_are_plain_values():
    with pytest.raises(ConfigError, match=r"model\.args must hold plain values, got {'act_layer': <class"):
        ModelConfig(args={"act_layer": TrainConfig})


@pytest.mark.parametrize("text", ["seed: 1\noptim: {lr: 1}\nseed: 2", "optim: {lr: 1, epochs: 2, lr: 3}"])
def test_a_key_that_stands_twice_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="two keys '(seed|lr)'"):
        load_config(write(tmp_path, text))


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


FREE = [
    ("1e-2", 0.01),
    ("-1e-3", -0.001),
    ("+2E3", 2000.0),
    ("1e22", 1e22),
    (".5", 0.5),
    ("5.", 5.0),
    ("012", 12),
    ("1_000", 1000),
    ("1_000.5", 1000.5),
    ("Inf", math.inf),
    ("-.inf", -math.inf),
    ("1:30", "1:30"),
    ("2024-01-01", "2024-01-01"),
    ("0x1f", "0x1f"),
    ("None", None),
    ("null", None),
    ("none", "none"),
    ("true", True),
    ("no", False),
    ("softmax", "softmax"),
    ("e5", "e5"),
    ("''", ""),
    ("'1e-2'", "1e-2"),
    ('"no"', "no"),
    ("'a: b'", "a: b"),
    ("'None'", "None"),
    ("{eps: 1e-2, sizes: [012, 1e1, '1e1'], of: {x: None}}",
     {"eps": 0.01, "sizes": [12, 10.0, "1e1"], "of": {"x": None}}),
]  # fmt: skip


def test_a_free_value_is_the_same_wherever_it_is_typed(tmp_path):
    """On the command line, in a file, and after the configuration was written and read again."""
    names = [f"x{i}" for i in range(len(FREE))]
    words = [word for name, (text, _) in zip(names, FREE, strict=True) for word in (name, text)]
    typed = read_options(["--model.args", *words], "train", "digits")
    text = "\n".join(f"    {name}: {text}" for name, (text, _) in zip(names, FREE, strict=True))
    in_file = load_config(write(tmp_path, f"model:\n  args:\n{text}"))
    again = load_config(write(tmp_path, dump_yaml(typed)))
    needed = [(value, type(value)) for _, value in FREE]
    for config in (typed, in_file, again):
        assert [(value, type(value)) for value in config.model.args.values()] == needed


@pytest.mark.parametrize(("text", "value"), FREE)
def test_numbers_are_those_of_typed_settings(text, value):
    if type(value) in (int, float):
        config = from_dict(TrainConfig, read_yaml(f"optim: {{lr: {text}}}", "here"), "here")
        assert config.optim.lr == value == float(text.replace(".inf", "inf"))


def test_free_values_go_over_those_of_a_recipe():
    recipe = load_config("emoji_scenes").model.args
    read = read_options(
        ["--config", "emoji_scenes", "--model.args", "depth", "1", "eps", "1e-2"], "train", "digits"
    )
    assert read.model.args == {**recipe, "depth": 1, "eps": 0.01}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "[1"], "Error parsing --model.args: x is not valid YAML"),
        (["x", "9" * 5000], "x is not valid YAML"),
        (["x", "[" * 20_000], "x is not valid YAML"),
        (["x", "{a: }b"], "x is not valid YAML"),
        (["x=1"], "names and values must follow each other"),
    ],
)
def test_a_free_value_that_is_none_is_named(capsys, words, message):
    with pytest.raises(SystemExit):
        read_options(["--model.args", *words], "train", "digits")
    assert message in capsys.readouterr().err.replace("\n", " ")
