"""The Hub without a network: its client is replaced where it would connect."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_hf_hub_args

from cbsa_torch.cli import main
from cbsa_torch.models import from_pretrained, load_checkpoint
from cbsa_torch.models import hub as models_hub
from cbsa_torch.models.checkpoint import read_info
from cbsa_torch.models.hub import HubError
from cbsa_torch.train import hub
from cbsa_torch.train.build import build_model
from cbsa_torch.train.hub import REPO_ID, published, push_to_hub, save_for_hub
from tests.helpers.hub import INFO, NAME, NoNetworkError, logits, write_weights

SECRET = "/home/somebody/secret"
DESCRIPTION = {
    **INFO,
    "config": {
        "output": f"{SECRET}/run",
        "seed": 1,
        "resume": False,
        "model": {"name": NAME, "image_size": None, "args": {}, "init_from": f"{SECRET}/start"},
        "data": {"name": "folder", "root": f"{SECRET}/animals", "hflip": 0.5},
        "optim": {"name": "lion", "lr": 1e-3, "keep": "best"},
        "engine": {"precision": "no", "plugin": f"{SECRET}/plugin"},
    },
    "epoch": 4,
    "val_top1": 0.8125,
    "cbsa_torch": "0.1.0",
}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with what must stay on the machine."""
    folder = write_weights(tmp_path / "run", DESCRIPTION)
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "skipped_images.txt"):
        (folder / name).write_text(SECRET)
    return folder


def test_saved_and_loaded_again(run, tmp_path):
    model, found = load_checkpoint(run / "model.safetensors")
    save_for_hub(tmp_path / "saved", model, found)
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    assert torch.equal(logits(from_pretrained(tmp_path / "saved")), logits(model))
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(logits(by_timm), logits(model))
    assert timm.data.resolve_model_data_config(by_timm)["std"] == [0.5]
    assert by_timm.pretrained_cfg["label_names"][0] == "cat"


class Api:
    """huggingface_hub's client; keeps what would be uploaded."""

    uploaded: dict[str, bytes]
    asked: dict

    def __init__(self, token=None):
        type(self).asked = {"token": token}

    @validate_hf_hub_args
    def create_repo(self, repo_id, private, exist_ok):
        self.asked |= {"repo_id": repo_id, "private": private}
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, folder_path, **rest):
        self.asked |= rest
        files = [p for p in Path(folder_path).rglob("*") if p.is_file()]
        type(self).uploaded = {str(p.relative_to(folder_path)): p.read_bytes() for p in files}
        return "https://huggingface.co/me/mine/commit/1"


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", Api)
    return Api


@pytest.mark.parametrize("card", [None, f"---\ntags: [x]\n---\n\n# Mine\n\nfrom_pretrained({REPO_ID!r})\n"])
def test_exactly_three_files_are_pushed_and_none_tells_of_the_machine(run, api, tmp_path, card):
    if card is not None:
        (run / "README.md").write_text(card)
    assert push_to_hub(run, "me/mine", private=True, token="t", branch="b").endswith("/commit/1")
    assert {"repo_id": "me/mine", "private": True, "revision": "b", "token": "t"}.items() <= api.asked.items()
    assert sorted(api.uploaded) == ["README.md", "config.json", "model.safetensors"]
    for name, content in api.uploaded.items():
        assert SECRET.encode() not in content, name
        assert str(tmp_path).encode() not in content, name
    text = api.uploaded["README.md"].decode()
    assert 'from_pretrained("me/mine")' in text or "from_pretrained('me/mine')" in text
    assert ("# Mine" in text) == (card is not None)
    assert ModelCard(text).data.tags
    pushed = tmp_path / "pushed.safetensors"
    pushed.write_bytes(api.uploaded["model.safetensors"])
    assert torch.equal(logits(from_pretrained(pushed)), logits(from_pretrained(run)))
    config = read_info(pushed)["config"]
    assert config == {
        "seed": 1,
        "model": {"name": NAME, "image_size": None, "args": {}},
        "data": {"name": "folder", "hflip": 0.5},
        "optim": {"name": "lion", "lr": 1e-3, "keep": "best"},
        "engine": {"precision": "no"},
    }


PRIVATE = {
    "classification": {
        **dict.fromkeys(("output", "resume", "accept_changes", "overwrite"), "mine"),
        "model": dict.fromkeys(("init_from",), "mine"),
        "data": dict.fromkeys(("root", "download", "workers"), "mine"),
        "engine": dict.fromkeys(("cpu", "threads", "tracker"), "mine"),
    },
    "adaptation": {"output": "mine", "model": {"original": "mine"}, "distill": {"teacher": "mine"}},
    "segmentation": {
        "model": {"encoder_from": "mine"},
        "data": {"root": "mine", "workers": "mine"},
        "windows": "mine",
    },
    "unheard_of": {"seed": "mine", "data": {"where": "mine"}},
}


@pytest.mark.parametrize("task", PRIVATE)
def test_what_is_private_in_every_task_stays_private(task):
    config = {"task": task, **PRIVATE[task], "unknown": "mine", "seed_file": "/mine"}
    info = {"model": NAME, "model_args": {}, "config": config}
    before = json.dumps(info)
    assert "mine" not in json.dumps(published(info))
    assert published(info)["model"] == NAME
    assert json.dumps(info) == before  # the description itself is not changed


def test_the_command(run, api, capsys):
    assert main(["push", "--checkpoint", str(run), "--repo-id", "me/mine"]) == 0
    assert "pushed: https://huggingface.co/me/mine/commit/1" in capsys.readouterr().out
    assert api.asked["private"] is None
    assert main(["push", "--checkpoint", str(run / "nowhere"), "--repo-id", "me/mine"]) == 1
    assert "no checkpoint at" in capsys.readouterr().err


def test_a_push_without_network_or_with_a_bad_name_is_one_line(run, api, monkeypatch, capsys):
    with pytest.raises(HubError, match="not the name of a repository"):
        push_to_hub(run, "me/my/mine")

    def refuse(self, **_):
        raise NoNetworkError("name or service not known")

    monkeypatch.setattr(api, "create_repo", refuse)
    assert main(["push", "--checkpoint", str(run), "--repo-id", "me/mine"]) == 1
    assert capsys.readouterr().err == "cbsa: the Hugging Face Hub and me/mine: name or service not known\n"


def test_fine_tuning_starts_from_the_hub_only_when_told(finished, monkeypatch):
    trained, result = finished
    asked = []

    def download(repo_id, filename, **_):
        asked.append(repo_id)
        return str(result.folder / filename)

    monkeypatch.setattr(models_hub, "hf_hub_download", download)
    config = copy.deepcopy(trained)
    config.model.args, config.model.init_from = {}, "hf-hub:me/colours"
    args = build_model(config, 5).args
    assert asked == ["me/colours"]
    assert args["num_classes"] == 5
    config.model.init_from = "me/colours"  # a folder that is not there
    with pytest.raises(FileNotFoundError):
        build_model(config, 5)
    assert asked == ["me/colours"]
