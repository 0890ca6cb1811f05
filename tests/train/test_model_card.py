from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from cbsa_torch.models import from_pretrained, load_checkpoint
from cbsa_torch.train.model_card import write_model_card
from cbsa_torch.train.run_folder import RunFolder


def test_the_card_of_a_run_says_what_the_run_measured(finished, tmp_path):
    _, result = finished
    run = RunFolder(result.folder)
    _, info = load_checkpoint(run.weights)
    folder = RunFolder(tmp_path)
    (tmp_path / "README.md").write_text("old")
    write_model_card(folder, info, run.read_metrics())
    text = (tmp_path / "README.md").read_text()
    assert f"**{100 * result.best_top1:.2f} %**, after epoch {result.best_epoch}" in text
    assert ModelCard(text).data.eval_results[0].metric_value == pytest.approx(result.best_top1, abs=1e-6)
    for name in ("blue", "green", "red"):
        assert f"| {name} |" in text
    assert str(run.path.parent) not in text
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_a_run_is_loaded_by_its_folder(finished):
    model = from_pretrained(finished[1].folder)
    assert model.info["class_names"] == ["blue", "green", "red"]
