"""The trainer's state on disk: files that are whole or refused, read without executing anything."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from cbsa_torch._core.files import write_atomically
from cbsa_torch.models.checkpoint import CheckpointError

MAGIC = b"cbsa_torch state 1\n"
DIGEST = 64
"""Characters of the SHA-256 that follows; the rest is torch's own format."""


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state (tensors, numbers, strings, plain containers) atomically, with its checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    write_atomically(path, MAGIC + hashlib.sha256(data).hexdigest().encode() + data)


def load_state(path: Path) -> dict[str, Any]:
    """Read a state written by :func:`save_state`.

    Raises:
        FileNotFoundError: no such file. CheckpointError: not such a file, truncated or altered.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no trainer state at {path}")
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise CheckpointError(f"{path} is not a trainer state")
    digest, data = content[len(MAGIC) :][:DIGEST], content[len(MAGIC) + DIGEST :]
    if hashlib.sha256(data).hexdigest().encode() != digest:
        raise CheckpointError(f"{path} is truncated or altered: its checksum does not fit")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a strange file raises nearly anything: IndexError, OSError, struct.error, ...
        raise CheckpointError(f"{path} holds no trainer state: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no trainer state")
    return state


class Checkpoints:
    """The states of a run, one file per saving; the newest few are kept.

    Args:
        folder: where they lie; created when the first is saved.
        keep: how many.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """The files, newest first."""
        return sorted((path for path in self.folder.glob("step_*.state") if path.is_file()), reverse=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a new state; only then remove those that are too many.

        Files of later steps are broken ones that were left aside: they do not count, else they would push the
        new ones out.
        """
        new = self.folder / f"step_{step:010d}.state"
        save_state(new, state)
        for path in [path for path in self.paths() if path <= new][self.keep :]:
            path.unlink()

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest file that is whole (None if there is none), and what is wrong with newer ones.

        Raises:
            CheckpointError: there are files, but none is whole.
        """
        problems: list[str] = []
        for path in self.paths():
            try:
                load_state(path)
            except (CheckpointError, OSError) as error:  # damaged, or may not be read
                problems.append(str(error))
            else:
                return path, problems
        if problems:
            raise CheckpointError(f"no checkpoint can be used: {'; '.join(problems)}")
        return None, problems
