"""``cbsa eval``."""

import json
import shutil

from cbsa_torch.cli import main


def test_it_prints_and_writes_the_accuracy(run, capsys):
    assert main(["eval", "--checkpoint", str(run)]) == 0
    record = json.loads((run / "eval_test.json").read_text())
    out = capsys.readouterr().out
    assert f"test accuracy: {record['top1']:.4f}  top-5: {record['top5']:.4f}" in out
    assert "images: 360" in out
    assert main(["eval", "--checkpoint", str(run), "--batch-size", "0"]) == 1
    assert capsys.readouterr().err == "cbsa: --batch-size must be at least 1, got 0\n"


def test_another_folder_with_unreadable_images(trained_on_folder, colours, tmp_path, capsys):
    checkpoint = ["eval", "--checkpoint", str(trained_on_folder)]
    assert main([*checkpoint, "--split", "val"]) == 0
    assert "val accuracy" in capsys.readouterr().out
    assert main(checkpoint) == 1
    assert "no test split" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(colours / "train", other / "test")
    shutil.copytree(colours / "train", other / "train")
    (other / "test" / "dark" / "bad.png").write_bytes(b"")
    checkpoint += ["--root", str(other), "--output", str(tmp_path / "eval.json")]
    for limit, message in (("0", "bad.png"), ("-1", "--max-bad-images must be at least 0")):
        assert main([*checkpoint, "--max-bad-images", limit]) == 1
        assert message in capsys.readouterr().err
    assert main([*checkpoint, "--max-bad-images", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 unreadable image(s) were left out" in out
    assert "images: 20" in out
