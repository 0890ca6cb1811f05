"""Model files: safetensors with what is needed to rebuild the model; foreign files read without executing.

A checkpoint of ours is one ``.safetensors`` file: the weights, and in its metadata the timm model name, the
constructor arguments and whatever the writer adds (class names, accuracy). It is replaced atomically.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

PICKLE_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".ckpt")


class CheckpointError(ValueError):
    """A file that is not the checkpoint it should be; nothing of it was executed or kept."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that ``path`` holds either the old content or all of the new, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, model: nn.Module, info: dict[str, Any]) -> None:
    """Save weights and ``info`` to a ``.safetensors`` file, atomically.

    ``info`` must hold ``model`` (the timm name) and ``model_args`` (its constructor arguments) for
    :func:`load_checkpoint`; it must be JSON.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(Path(path), save(tensors, metadata={"cbsa_torch": json.dumps(info)}))


def load_checkpoint(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the model of a file written by :func:`save_checkpoint`, in eval mode on the CPU.

    Returns:
        The model and the ``info`` saved with it.

    Raises:
        FileNotFoundError: no such file. CheckpointError: not such a file, truncated, or of another model.

    """
    path = Path(path)
    tensors = read_tensors(path)
    info = read_info(path)
    try:
        model = timm.create_model(info["model"], **info["model_args"])
    except Exception as error:
        raise CheckpointError(f"cannot build the model {info.get('model')!r} of {path}: {error}") from error
    load_strictly(model, tensors, str(path))
    return model.eval(), info


def read_info(path: Path) -> dict[str, Any]:
    """The ``info`` of a file written by :func:`save_checkpoint`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        info = json.loads(metadata["cbsa_torch"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} was not written by cbsa_torch (no model description in it); "
            "for released CBT weights use load_official"
        ) from error
    if not isinstance(info, dict) or not {"model", "model_args"} <= info.keys():
        raise CheckpointError(f"{path} does not say which model it holds")
    return info


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors or from a PyTorch file, tensors only.

    Pickled code is never executed: PyTorch files are read with ``weights_only=True``. Training checkpoints
    that keep the weights under ``state_dict`` or ``model`` are unwrapped, and so are ``module.`` prefixes.

    Raises:
        FileNotFoundError: no such file. CheckpointError: unreadable, unsafe, or without tensors.

    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
        return unwrap(tensors, str(path))
    if path.suffix not in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path} must be a .safetensors file or a PyTorch file ({', '.join(PICKLE_SUFFIXES)})"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path} holds something other than tensors and plain containers, which would need executing "
            f"pickled code; refused ({reason})"
        ) from error
    except Exception as error:  # a broken file raises nearly anything: IndexError, struct.error, ...
        raise CheckpointError(f"{path} is truncated or not a PyTorch file: {error}") from error
    return unwrap(content, str(path))


def unwrap(content: Any, source: str) -> dict[str, Tensor]:
    """Find the state dict in what a checkpoint file held, and strip ``module.`` prefixes."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{source} holds no state dict")
    stray = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if stray:
        raise CheckpointError(f"{source} holds entries that are not tensors: {', '.join(stray[:5])}")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load ``tensors`` into ``model``; every name and shape must fit, else one error lists what does not."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in own]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model needs {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{source} does not fit the model: {shown}")
    model.load_state_dict(tensors)
