"""``cbsa count``."""

import json
import re

import pytest

from cbsa_torch.cli import main


def test_it_prints_writes_and_draws(tmp_path, capsys):
    files = ["--output", str(tmp_path / "counts.json"), "--plot", str(tmp_path / "flops.svg")]
    assert main(["count", "cbt_tiny_patch16_224", "crate_tiny_patch16_224", "--layers", *files]) == 0
    out = capsys.readouterr().out
    assert re.search(r"cbt_tiny_patch16_224\s+3x224x224\s+1,789,192\s+1\.121\s+0\.9466\s+528,768", out)
    assert re.search(r"blocks\.11\.attn\s+MSSA", out)
    rows = json.loads((tmp_path / "counts.json").read_text())
    assert rows[0]["total"]["similarities"] == 528_768
    published, fused = rows[0]["total"], rows[0]["fused"]["total"]
    assert rows[0]["fused"]["torch_flops"] == fused["products"]
    assert published["products"] - fused["products"] == 12 * 2 * 197 * 192**2
    assert (tmp_path / "flops.svg").read_text().startswith("<svg")
    curves = json.loads((tmp_path / "flops.json").read_text())
    assert (curves["dim"], curves["num_heads"]) == (192, 3)
    assert all(len(values) == len(curves["tokens"]) for values in curves["flops"].values())


def test_it_takes_any_size_and_any_model(capsys):
    assert main(["count", "cbt_tiny_patch16_224", "resnet10t", "--image-size", "96", "160"]) == 0
    out = capsys.readouterr().out
    assert out.count("3x96x160") == 2
    assert main(["count", "swin_tiny_patch4_window7_224"]) == 0
    assert "torch's own counter sees" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no models given; name some"),
        ("cbt_tinny", "no model 'cbt_tinny' in timm; did you mean 'cbt_tiny_patch16_224'"),
        ("cbt_tiny_patch16_224 --image-size 1 2 3", "--image-size must be one or two positive numbers"),
        ("cbt_tiny_patch16_224 --image-size 0", "--image-size must be one or two positive numbers"),
        ("cbt_tiny_patch16_224 --args contraction exat", "did you mean 'exact'"),
        (
            "cbt_tiny_patch16_224 --output x.json --plot x.png",
            "--output x.json is a file that --plot x.png writes",
        ),
        ("cbt_tiny_patch16_224 --args checkpoint_path x", "--args must not hold checkpoint_path"),
        ("resnet18 --args block foo", "cannot count resnet18"),
        ("cbt_tiny_patch16_224 --args img_size 64 --image-size 32", "cannot count cbt_tiny_patch16_224"),
        ("cbt_tiny_patch16_224 --plot x.pdf", "--plot must end in .png or .svg"),
        ("vit_tiny_patch16_224 --plot x.png", "vit_tiny_patch16_224 has no mixer of ours"),
        ("crate_original_tiny_patch16_224 --image-size 100", "multiples of patch_size 16"),
    ],
)
def test_it_refuses_what_it_cannot(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["count", *arguments.split()]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
