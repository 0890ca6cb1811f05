"""Models by name: from the Hub (its client is replaced where it would connect), from folders, from files."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cbsa_torch.models import from_pretrained, hub, load_checkpoint, load_official
from cbsa_torch.models.hub import HubError
from tests.helpers.hub import INFO, NoNetworkError, logits, write_weights
from tests.helpers.official import official_model, official_state


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_weights(tmp_path / "run", INFO)


def test_from_a_folder_or_a_file(folder):
    expected = logits(load_checkpoint(folder / "model.safetensors")[0])
    for source in (folder, str(folder / "model.safetensors")):
        model = from_pretrained(source)
        assert not model.training
        assert torch.equal(logits(model), expected)
        assert model.info == INFO
        prepared = timm.data.resolve_model_data_config(model)
        assert (prepared["input_size"], prepared["mean"]) == ([1, 8, 8], [0.25])


def test_from_a_released_checkpoint(tmp_path):
    official = official_state(official_model())
    torch.save({"state_dict": official}, tmp_path / "released.pth")
    model = from_pretrained(tmp_path / "released.pth")
    assert model.info["model"] == "cbt_tiny_patch16_224"
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), load_official(official)(images))


def test_from_the_hub(folder, monkeypatch):
    asked = {}

    def download(repo_id, filename, **rest):
        asked.update(rest, repo_id=repo_id, filename=filename)
        return str(folder / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    for source in ("me/mine", "hf-hub:me/mine"):
        model = from_pretrained(source, revision="v1", token="t")
        assert torch.equal(logits(model), logits(from_pretrained(folder)))
        assert (asked["repo_id"], asked["filename"]) == ("me/mine", "model.safetensors")
        assert (asked["revision"], asked["token"]) == ("v1", "t")


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


def test_what_is_no_repository_is_looked_for_here(tmp_path):
    for name in ("runs/x.safetensors", "runs/x.pth"):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at {name}"):
            from_pretrained(name)
    with pytest.raises(FileNotFoundError, match="holds no trained model"):
        from_pretrained(tmp_path)
