"""The check of a CUDA device, in Triton's interpreter."""

import json

import torch
from benchmarks import gpu_check


def test_quick(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "gpu.json"
    assert gpu_check.main(["--quick", "--only", "limits", "correct", "layers", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())
    cases = [row for row in rows if row["kind"] == "correct"]
    assert len(cases) == 2 * 3 * 2 * 2  # problems, contractions, dtypes, implementations
    assert all(row["right"] and row["same_bits"] and row["error"] < 1e-2 for row in cases)
    assert {row["name"] for row in rows if row["kind"] == "layer"} == {
        *("naive", "eager", "triton", "auto", "softmax attention")
    }


def test_a_wrong_case_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outputs = gpu_check._outputs
    monkeypatch.setattr(
        gpu_check,
        "_outputs",
        lambda *args: [t * (1.1 if args[4] == "triton" else 1.0) for t in outputs(*args)],
    )
    output = tmp_path / "gpu.json"
    assert gpu_check.main(["--quick", "--only", "correct", "--output", str(output)]) == 1
    wrong = {row["impl"] for row in json.loads(output.read_text()) if row.get("right") is False}
    assert wrong == {"triton"}
