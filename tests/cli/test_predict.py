"""``cbsa predict``."""

import json

from cbsa_torch.cli import main


def test_it_names_classes(trained, digit, tmp_path, capsys):
    output = tmp_path / "predictions.json"
    args = ["--checkpoint", str(trained), "--top", "3", "--output", str(output)]
    assert main(["predict", str(digit), *args]) == 0
    (row,) = json.loads(output.read_text())
    assert row["image"] == str(digit)
    assert len(row["classes"]) == 3
    out = capsys.readouterr().out
    assert all(f"{p:.4f}" in out for p in row["probabilities"])


def test_a_bad_image_stops_or_is_skipped(trained, digit, tmp_path, capsys):
    bad, output = tmp_path / "bad.png", tmp_path / "predictions.json"
    bad.write_bytes(b"not an image")
    command = ["predict", str(bad), str(digit), "--checkpoint", str(trained), "--output", str(output)]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert err.startswith("cbsa: ")
    assert "bad.png" in err
    assert main([*command, "--on-bad-image", "skip"]) == 0
    first, second = json.loads(output.read_text())
    assert "bad.png" in first["error"]
    assert second["error"] is None
    assert len(second["classes"]) == 5
