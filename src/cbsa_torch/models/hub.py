"""Trained models by name: from the Hugging Face Hub, from a run's folder or from a file of weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
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

from cbsa_torch.models.checkpoint import (
    PICKLE_SUFFIXES,
    CheckpointError,
    is_ours,
    load_checkpoint,
    read_tensors,
)
from cbsa_torch.models.convert import is_official, read_official
from cbsa_torch.models.foreign import read_foreign
from cbsa_torch.models.shipped import SHIPPED, WEIGHTS
from cbsa_torch.models.whitebox import WhiteBoxTransformer

PREFIX = "hf-hub:"
"""Marks a repository where a path is allowed, too; as in timm."""
CLIENT_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
"""What the Hub's client raises without a network: it was requests, then httpx, then httpx2."""


class HubError(OSError):
    """The Hub could not be reached, or has not what was asked for; the message says which and what to do."""


def from_pretrained(
    source: str | Path,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Load a trained model from the Hugging Face Hub, from a run's folder or from a file.

    Args:
        source: ``"owner/name"`` of a repository (``"hf-hub:owner/name"`` if a folder has that name as well), a
            folder that holds ``model.safetensors``, the name of weights that come with the package
            (``"cbt_pico_patch1_8.certified_digits"``), or a file: one of this library, a released checkpoint of
            the official code (see :func:`cbsa_torch.models.load_official`), or a plain state dict with the
            names of timm, transformers, torchvision or the DINO hubs (docs/reference/weights.md).
        model: name in timm of the model that a plain state dict is of. Default: what the file says.
        model_args: constructor arguments beside that name.
        revision: branch, tag or commit of the repository. Default: main.
        token: of your account, for private repositories. Default: that of ``hf auth login``.
        cache_dir: where downloads are kept. Default: huggingface_hub's.
        local_files_only: use what is in the cache, ask nobody.

    Returns:
        The model in eval mode on the CPU. ``model.info`` is its description (``class_names``, ``input``, ...),
        and ``timm.data.resolve_model_data_config(model)`` knows how images are to be prepared.

    Raises:
        HubError: no network, no such repository, revision or file, or no permission.
        FileNotFoundError: no weights in that folder. CheckpointError: weights of an unknown kind, or damaged;
            code that a file may hold is never executed.

    Examples:
        >>> from cbsa_torch.models import from_pretrained
        >>> model = from_pretrained("runs/photos")  # or "owner/name" on the Hub
        >>> model.info["class_names"]
        ['blue', 'green', 'red']
    """
    path = fetch_weights(
        source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    opened, info = open_weights(path, model, model_args)
    opened.info = info  # type: ignore[assignment]
    opened.pretrained_cfg = {  # type: ignore[assignment]
        **getattr(opened, "pretrained_cfg", {}),
        **timm_config(opened, info)["pretrained_cfg"],
    }
    return opened


def open_weights(
    path: str | Path, model: str | None = None, model_args: Mapping[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a file of any known kind, in eval mode, and its description: ``model``, ``model_args``, ...

    Kinds of files are told apart here and nowhere else.

    Args:
        path: the file.
        model: the name in timm, which plain state dicts do not say; other files do.
        model_args: constructor arguments beside that name.

    Raises:
        FileNotFoundError: no such file. CheckpointError: a file of no known kind, or damaged; ``model`` is
            missing, or is not what the file holds.
    """
    path = Path(path)
    if not path.is_file() or is_ours(path):
        opened, info = load_checkpoint(path)
    else:
        tensors = read_tensors(path)
        if not is_official(tensors):
            if model is None:
                raise CheckpointError(
                    f"{path} holds a plain state dict, which does not say of what model it is: give that "
                    "model's name in timm beside it (--model NAME of cbsa eval, predict and report; model= "
                    "in Python)"
                )
            return read_foreign(tensors, str(path), model, model_args)
        opened, info = read_official(tensors, str(path))
    if model not in (None, info["model"]):
        raise CheckpointError(f"{path} holds {info['model']!r}, not the {model!r} that was asked for")
    if model_args:
        raise CheckpointError(f"{path} has its model's arguments, leave them out; got {dict(model_args)}")
    return opened, info


def fetch_weights(source: str | Path, **download: Any) -> Path:
    """The file of weights of ``source`` (see :func:`from_pretrained`), downloaded if it is on the Hub."""
    name = str(source)
    if not name.startswith(PREFIX) and (Path(source).exists() or not _may_be_a_repository(name)):
        return weights_path(source)
    name = name.removeprefix(PREFIX)
    with explained(name):
        return Path(hf_hub_download(name, WEIGHTS, **download))


def weights_path(checkpoint: str | Path) -> Path:
    """The file of weights in a folder, that of weights of the package by their name, or the file itself."""
    path = Path(checkpoint)
    if not path.exists() and str(checkpoint) in SHIPPED:
        path = SHIPPED[str(checkpoint)].folder
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
    args = dict(info["model_args"])
    if isinstance(model, WhiteBoxTransformer):
        args.pop("num_classes", None)  # timm has it from above; transformers' TimmWrapper refuses it twice
    config = {
        "architecture": info["model"],
        "num_classes": pretrained["num_classes"],
        "model_args": args,
        "pretrained_cfg": pretrained,
    }
    names = info.get("class_names")
    if names and len(set(names)) == len(names) == pretrained["num_classes"]:
        config["label_names"] = list(names)
    return config


def _may_be_a_repository(name: str) -> bool:
    is_file = name.endswith((".safetensors", *PICKLE_SUFFIXES))
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not is_file


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Raise what the Hub's client raises as one :class:`HubError` that says what to do."""
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
