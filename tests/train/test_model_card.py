from __future__ import annotations

import copy

import pytest
from huggingface_hub import ModelCard

from cbsa_torch.models import from_pretrained, hub, load_checkpoint
from cbsa_torch.train.build import build_model
from cbsa_torch.train.model_card import write_model_card
from cbsa_torch.train.run.folder import RunFolder


def test_the_card_of_a_run_says_what_the_run_measured(finished, tmp_path):
    _, result = finished
    run = RunFolder(result.folder)
    _, info = load_checkpoint(run.weights)
    folder = RunFolder(tmp_path)
    (tmp_path / "README.md").write_text("old")
    write_model_card(folder, info, run.read_metrics())
    text = (tmp_path / "README.md").read_text()
    assert f"**{100 * result.best_score:.2f} %**, after epoch {result.best_epoch}" in text
    assert ModelCard(text).data.eval_results[0].metric_value == pytest.approx(result.best_score, abs=1e-6)
    for name in ("blue", "green", "red"):
        assert f"| {name} |" in text
    assert str(run.path.parent) not in text
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_a_run_is_loaded_by_its_folder(finished):
    model = from_pretrained(finished[1].folder)
    assert model.info["class_names"] == ["blue", "green", "red"]


def test_fine_tuning_starts_from_the_hub_only_when_told(finished, monkeypatch):
    trained, result = finished
    asked = []

    def download(repo_id, filename, **_):
        asked.append(repo_id)
        return str(result.folder / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    config = copy.deepcopy(trained)
    config.model.args, config.model.init_from = {}, "hf-hub:me/colours"
    _, args = build_model(config, 5)
    assert asked == ["me/colours"]
    assert args["num_classes"] == 5
    config.model.init_from = "me/colours"  # a folder that is not there
    with pytest.raises(FileNotFoundError):
        build_model(config, 5)
    assert asked == ["me/colours"]
