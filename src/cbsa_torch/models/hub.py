"""Models on the Hugging Face Hub, through its mixin: weights, a description, a card; no pickles."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from cbsa_torch.models.card import REPO_ID, model_card
from cbsa_torch.models.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from cbsa_torch.models.private import without_paths

WEIGHTS = "model.safetensors"
PREFIX = "hf-hub:"
"""Marks a repository where a path is allowed, too; as in timm."""
CLIENT_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
"""What the Hub's client raises without a network: it was requests, then httpx, then httpx2."""


class HubError(OSError):
    """The Hub could not be reached, or has not what was asked for; the message says which and what to do."""


class HubModel(ModelHubMixin):
    """A trained model as the Hub holds it: ``save_pretrained``, ``push_to_hub`` and ``from_pretrained``.

    These write and read three files: ``model.safetensors``, which alone is enough to rebuild the model;
    ``config.json``, by which timm builds it; ``README.md``, the card. Settings that tell of the machine it was
    trained on (folders) are left out.

    Args:
        model: the module.
        info: its description, as of :func:`cbsa_torch.models.load_checkpoint`.
        card: text of the card. Default: made from ``info``.
    """

    def __init__(self, model: nn.Module, info: dict[str, Any], card: str | None = None) -> None:
        self.model = model
        self.info = info
        self.card = card

    @classmethod
    def open(cls, checkpoint: str | Path) -> HubModel:
        """A model from a run's folder or a ``.safetensors`` file, with the card beside it if there is one."""
        path = weights_path(checkpoint)
        card = path.with_name("README.md")
        model, info = load_checkpoint(path)
        return cls(model, info, card.read_text(encoding="utf-8") if card.is_file() else None)

    def _save_pretrained(self, save_directory: Path) -> None:
        info = without_paths(self.info)
        save_checkpoint(save_directory / WEIGHTS, self.model, info)
        (save_directory / "config.json").write_text(json.dumps(timm_config(self.model, info), indent=2) + "\n")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **download: Any) -> HubModel:
        if Path(model_id).is_dir():
            return cls.open(model_id)
        return cls(*load_checkpoint(hf_hub_download(model_id, WEIGHTS, **download)))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card, for the mixin."""
        return ModelCard(self.card or model_card(self.info))


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Load a trained model from the Hugging Face Hub, from a run's folder or from a file.

    Args:
        source: ``"owner/name"`` of a repository (``"hf-hub:owner/name"`` if a folder has that name as well), a
            folder that holds ``model.safetensors``, or such a file.
        revision: branch, tag or commit of the repository.
        token: of your account, for private repositories. Default: that of ``hf auth login``.
        cache_dir: where downloads are kept. Default: huggingface_hub's.
        local_files_only: use what is in the cache, ask nobody.

    Returns:
        The model in eval mode on the CPU. ``model.info`` is its description (``class_names``, ``input``, ...),
        and ``timm.data.resolve_model_data_config(model)`` knows how images are to be prepared.

    Raises:
        HubError: no network, no such repository, revision or file, or no permission.
        FileNotFoundError: no weights in that folder. CheckpointError: not weights of this library, or damaged.
    """
    path = fetch_weights(
        source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    model, info = load_checkpoint(path)
    model.info = info  # type: ignore[assignment]
    model.pretrained_cfg = {  # type: ignore[assignment]
        **getattr(model, "pretrained_cfg", {}),
        **timm_config(model, info)["pretrained_cfg"],
    }
    return model


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
        checkpoint: a run's folder, or a ``.safetensors`` file of this library.
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
    hub_model = HubModel.open(checkpoint)
    hub_model.card = (hub_model.card or model_card(hub_model.info)).replace(REPO_ID, repo_id)
    with _explained(repo_id):
        commit = hub_model.push_to_hub(
            repo_id, private=private, token=token, branch=branch, commit_message=commit_message
        )
    return str(commit)


def fetch_weights(source: str | Path, **download: Any) -> Path:
    """The ``.safetensors`` file of ``source`` (see :func:`from_pretrained`), downloaded if it is on the Hub."""
    name = str(source)
    if not name.startswith(PREFIX) and (Path(source).exists() or not _may_be_a_repository(name)):
        return weights_path(source)
    name = name.removeprefix(PREFIX)
    with _explained(name):
        return Path(hf_hub_download(name, WEIGHTS, **download))


def weights_path(checkpoint: str | Path) -> Path:
    """The file of weights in a folder, or the file itself."""
    path = Path(checkpoint)
    if not path.is_dir():
        return path
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"{checkpoint} holds no trained model (no {WEIGHTS})")
    return path / WEIGHTS


def timm_config(model: nn.Module, info: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` as timm reads it: the architecture, its arguments, and how images are prepared."""
    pretrained: dict[str, Any] = {"num_classes": getattr(model, "num_classes", None)}
    fed = info.get("input") or {}
    pretrained |= {
        key: fed[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct") if key in fed
    }
    config = {
        "architecture": info["model"],
        "num_classes": pretrained["num_classes"],
        "model_args": dict(info["model_args"]),
        "pretrained_cfg": pretrained,
    }
    names = info.get("class_names")
    if names and len(set(names)) == len(names) == pretrained["num_classes"]:
        config["label_names"] = list(names)
    return config


def _may_be_a_repository(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.endswith(".safetensors")


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """What the Hub's client raises, as one error that says what to do."""
    try:
        yield
    except (CheckpointError, HubError):
        raise
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not the name of a repository (owner/name): {error}") from error
    except GatedRepoError as error:
        raise HubError(
            f"{repo_id} on the Hugging Face Hub is gated: ask its owner for access, then log in with "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"there is no folder {repo_id} here, and no repository {repo_id} on the Hugging Face Hub that you "
            "may see; for a private one log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} on the Hugging Face Hub has no such revision: {_first(error)}") from error
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"there is no folder {repo_id} here, and {repo_id} is neither in the cache nor could it be fetched "
            f"from the Hugging Face Hub: {_first(error)}"
        ) from error
    except EntryNotFoundError as error:
        raise HubError(f"{repo_id} on the Hugging Face Hub holds no {WEIGHTS}") from error
    except CLIENT_ERRORS as error:  # no network, no token, refused
        raise HubError(f"the Hugging Face Hub and {repo_id}: {_first(error)}") from error


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
