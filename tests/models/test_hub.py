"""The Hub without a network: its client is replaced where it would connect."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.hub_mixin
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cbsa_torch.cli import main
from cbsa_torch.models import HubModel, from_pretrained, hub, load_checkpoint, push_to_hub, save_checkpoint
from cbsa_torch.models.checkpoint import CheckpointError, read_info
from cbsa_torch.models.hub import HubError
from cbsa_torch.models.private import without_paths

SECRET = "/home/somebody/secret"
NAME = "cbt_pico_patch1_8"


@pytest.fixture(scope="module")
def info() -> dict:
    return {
        "model": NAME,
        "model_args": {"embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 3},
        "class_names": ["cat", "dog", "/n|a"],
        "input": {
            "input_size": [1, 8, 8],
            "mean": [0.25],
            "std": [0.5],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
        },
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
def run(tmp_path, info) -> Path:
    """A run's folder with what must stay on the machine."""
    torch.manual_seed(0)
    folder = tmp_path / "run"
    save_checkpoint(folder / "model.safetensors", timm.create_model(NAME, **info["model_args"]), info)
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "skipped_images.txt"):
        (folder / name).write_text(SECRET)
    return folder


def logits(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 128).view(2, 1, 8, 8))


def test_saved_and_loaded_again(run, tmp_path, info):
    expected = logits(load_checkpoint(run / "model.safetensors")[0])
    HubModel.open(run).save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    model = from_pretrained(tmp_path / "saved")
    assert not model.training
    assert torch.equal(logits(model), expected)
    assert model.info["class_names"] == info["class_names"]
    prepared = timm.data.resolve_model_data_config(model)
    assert (prepared["input_size"], prepared["mean"]) == ([1, 8, 8], [0.25])
    again = HubModel.from_pretrained(str(tmp_path / "saved"))
    assert torch.equal(logits(again.model), expected)
    for source in (run, str(run / "model.safetensors")):
        assert torch.equal(logits(from_pretrained(source)), expected)


def test_timm_builds_it_from_the_saved_folder(run, tmp_path):
    HubModel.open(run).save_pretrained(tmp_path / "saved")
    model = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert torch.equal(logits(model), logits(from_pretrained(run)))
    assert timm.data.resolve_model_data_config(model)["std"] == [0.5]
    assert model.pretrained_cfg["label_names"][0] == "cat"


class Api:
    """What the mixin asks of huggingface_hub's client; keeps what would be uploaded."""

    uploaded: dict[str, bytes]
    asked: dict

    def __init__(self, token=None):
        type(self).asked = {"token": token}

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
    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    return Api


@pytest.mark.parametrize("card", [None, f"---\ntags: [x]\n---\n\n# Mine\n\nfrom_pretrained({hub.REPO_ID!r})\n"])
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


def test_the_description_itself_is_not_changed(info):
    before = json.dumps(info)
    without_paths(info)
    assert json.dumps(info) == before


def test_the_command(run, api, capsys):
    assert main(["push", "--checkpoint", str(run), "--repo-id", "me/mine"]) == 0
    assert "pushed: https://huggingface.co/me/mine/commit/1" in capsys.readouterr().out
    assert api.asked["private"] is None
    assert main(["push", "--checkpoint", str(run / "nowhere"), "--repo-id", "me/mine"]) == 1
    assert "no checkpoint at" in capsys.readouterr().err


def test_from_the_hub(run, monkeypatch):
    asked = {}

    def download(repo_id, filename, **rest):
        asked.update(rest, repo_id=repo_id, filename=filename)
        return str(run / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    for source in ("me/mine", "hf-hub:me/mine"):
        model = from_pretrained(source, revision="v1", token="t")
        assert torch.equal(logits(model), logits(from_pretrained(run)))
        assert asked["repo_id"] == "me/mine"
        assert asked["filename"] == "model.safetensors"
        assert (asked["revision"], asked["token"]) == ("v1", "t")


class NoNetworkError(HfHubHTTPError.__bases__[0]):
    """An error of the HTTP client that huggingface_hub uses, whichever that is."""


def hub_error(kind, message):
    """An error of the Hub without the response it belongs to."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (hub_error(RepositoryNotFoundError, "x"), "no folder me/mine here, and no repository me/mine"),
        (hub_error(GatedRepoError, "x"), "gated: ask its owner"),
        (hub_error(RevisionNotFoundError, "no v1"), "no such revision: no v1"),
        (
            LocalEntryNotFoundError("no network\nmore"),
            "neither in the cache nor could it be fetched .*: no network$",
        ),
        (EntryNotFoundError("x"), "holds no model.safetensors"),
        (OfflineModeIsEnabled("offline mode"), "offline mode"),
        (NoNetworkError("name or service not known"), "name or service not known"),
    ],
)
def test_what_the_hub_refuses_is_explained(monkeypatch, raised, message):
    def download(*_, **__):
        raise raised

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(HubError, match=message):
        from_pretrained("me/mine")


def test_a_push_without_network_or_with_a_bad_name_is_one_line(run, api, monkeypatch, capsys):
    def refuse(self, **_):
        raise NoNetworkError("name or service not known")

    monkeypatch.setattr(api, "create_repo", refuse)
    assert main(["push", "--checkpoint", str(run), "--repo-id", "me/mine"]) == 1
    assert capsys.readouterr().err == "cbsa: the Hugging Face Hub and me/mine: name or service not known\n"
    with pytest.raises(HubError, match="not the name of a repository"):
        push_to_hub(run, "me/my/mine")


def test_what_is_no_repository_is_looked_for_here(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at runs/x.safetensors"):
        from_pretrained("runs/x.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no trained model"):
        from_pretrained(tmp_path)


def test_a_malicious_pickle_in_a_repository_is_never_read(tmp_path, info):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(FileNotFoundError):
        from_pretrained(folder)
    (folder / "model.safetensors").write_bytes((folder / "pytorch_model.bin").read_bytes())
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        from_pretrained(folder)
