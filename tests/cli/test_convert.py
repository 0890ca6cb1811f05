"""``cbsa convert``."""

import torch

from cbsa_torch.cli import main
from cbsa_torch.models import load_checkpoint
from tests.helpers.official import official_model, official_state


def test_it_writes_a_model(tmp_path, capsys):
    torch.save(official_state(official_model()), tmp_path / "official.pth")
    output = tmp_path / "ours.safetensors"
    assert main(["convert", "--official", str(tmp_path / "official.pth"), "--output", str(output)]) == 0
    assert "cbt_tiny_patch16_224" in capsys.readouterr().out
    assert load_checkpoint(output)[0].num_classes == 5


def test_what_it_refuses(trained, tmp_path, capsys):
    output, ours = tmp_path / "ours.safetensors", str(trained / "model.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pth")
    for official, options, message in (
        (ours, ["--output", str(output)], "is not an official checkpoint"),
        (str(tmp_path / "x.pth"), ["--output", str(tmp_path / "y.pth")], "x.pth is not an official checkpoint"),
        (ours, ["--output", str(output), "--num-heads", "0"], "--num-heads must be at least 1"),
    ):
        assert main(["convert", "--official", official, *options]) == 1
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]
