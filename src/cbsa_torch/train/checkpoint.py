"""The trainer's state: one file, replaced atomically, read without executing anything."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cbsa_torch._core.files import write_atomically
from cbsa_torch.models.checkpoint import CheckpointError


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state (tensors, numbers, strings, plain containers) atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """Read a state written by :func:`save_state`."""
    if not path.is_file():
        raise FileNotFoundError(f"no trainer state at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file raises nearly anything: IndexError, OSError, struct.error, ...
        raise CheckpointError(f"{path} is broken or not a trainer state: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a trainer state")
    return state


def random_states() -> dict[str, Any]:
    """The state of every generator a training step draws from, as plain containers."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo what was drawn since :func:`random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
