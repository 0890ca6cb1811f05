"""``cbsa convert``."""

import timm
import torch

from cbsa_torch.cli import main
from cbsa_torch.models import load_checkpoint


def test_it_writes_a_model(tmp_path, capsys):
    arguments = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    ours = timm.create_model("cbt_tiny_patch16_224", **arguments, layout="official").state_dict()
    names = {"stem.": "to_patch_embedding.", "norm.": "mlp_head.0.", "head.": "mlp_head.1."}
    names |= {"blocks.0.attn.qkv": "transformer.layers.0.0.fn.proj"}
    names |= {"blocks.0.attn.proj": "transformer.layers.0.0.fn.to_out"}
    names |= {"blocks.0.attn.step_tokens": "transformer.layers.0.0.fn.step_x"}
    names |= {"blocks.0.attn.step_representatives": "transformer.layers.0.0.fn.step_rep"}
    names |= {"blocks.0.norm1": "transformer.layers.0.0.norm", "blocks.0.norm2": "transformer.layers.0.1.norm"}
    names |= {"blocks.0.ista": "transformer.layers.0.1.fn", "pos_embed": "pos_embedding"}
    official = {}
    for key, tensor in ours.items():
        new = next((key.replace(a, b, 1) for a, b in names.items() if key.startswith(a)), key)
        official[new] = tensor.reshape(-1, 1, 1) if ".step_" in new else tensor
    torch.save(official, tmp_path / "official.pth")
    output = tmp_path / "ours.safetensors"
    assert main(["convert", "--official", str(tmp_path / "official.pth"), "--output", str(output)]) == 0
    assert "cbt_tiny_patch16_224" in capsys.readouterr().out
    assert load_checkpoint(output)[0].num_classes == 3


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
