"""Trained models for the Hugging Face Hub: weights, description and card, in a folder or a repository."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import nn

from cbsa_torch.models.checkpoint import load_checkpoint, save_checkpoint
from cbsa_torch.models.hub import WEIGHTS, explained, timm_config, weights_path
from cbsa_torch.train.card import REPO_ID, model_card, published


def save_for_hub(
    folder: str | Path, model: nn.Module, info: Mapping[str, Any], card: str | None = None
) -> None:
    """Write the three files by which others load a model; settings that tell of this machine are left out.

    They are ``model.safetensors``, which alone is enough to rebuild the model; ``config.json``, by which timm
    builds it; and ``README.md``, the card.

    Args:
        folder: is made if there is none.
        model: the module.
        info: its description, as of :func:`cbsa_torch.models.load_checkpoint`.
        card: text of the card. Default: made from ``info``.
    """
    folder, info = Path(folder), published(info)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / WEIGHTS, model, info)
    (folder / "config.json").write_text(json.dumps(timm_config(model, info), indent=2) + "\n")
    (folder / "README.md").write_text(model_card(info) if card is None else card, encoding="utf-8")


def push_to_hub(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    commit_message: str = "Upload model by cbsa-torch",
) -> str:
    """Upload the weights that a run keeps, with their description and card; nothing else of its folder.

    Args:
        checkpoint: a run's folder, or a ``.safetensors`` file of this library. A ``README.md`` beside the
            weights is uploaded as the card; without one it is written.
        repo_id: ``"owner/name"``; made if there is no such repository.
        private: whether a new repository is private. Default: the owner's default.
        token: of your account. Default: that of ``hf auth login``.
        branch: what to push to. Default: main.
        commit_message: of the upload.

    Returns:
        The address of the commit.

    Raises:
        HubError: no network, not logged in, no permission, or not a name of a repository.
        FileNotFoundError, CheckpointError: the checkpoint cannot be read.
    """
    path = weights_path(checkpoint)
    model, info = load_checkpoint(path)
    readme = path.with_name("README.md")
    card = readme.read_text(encoding="utf-8") if readme.is_file() else model_card(info)
    with tempfile.TemporaryDirectory() as folder:
        save_for_hub(folder, model, info, card.replace(REPO_ID, repo_id))
        with explained(repo_id):
            api = HfApi(token=token)
            repository = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=commit_message, revision=branch
            )
    return str(commit)
