"""The training state: what a run must remember to go on exactly where it was, and its files.

A state has the weights, the optimiser, the random generators, how far the run is, and facts about the data. Its
file is whole or refused (checksum), and read without executing anything.
"""

from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from cbsa_torch._core.checks import some_of
from cbsa_torch._core.files import write_atomically
from cbsa_torch.models.checkpoint import CheckpointError, check_fit
from cbsa_torch.train.errors import NonFiniteLossError

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""Gather what is sharded: a file is the same however many processes wrote it."""

SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")
"""What torch's optimisers with a fused step remember of every weight."""
MAGIC = b"cbsa_torch state 1\n"
DIGEST = 64
"""Characters of the SHA-256 that follows; the rest is torch's own format."""


def check_finite(accelerator: Accelerator, model: nn.Module, step: int) -> None:
    """Refuse to keep weights that a step has spoiled although its loss was finite.

    To be called on every process; in each of them it sees its own.

    Raises:
        NonFiniteLossError: one of them, on any process, is NaN or infinite.
    """
    values = {
        name: value.to_local() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    finite = torch.stack([value.isfinite().all() for value in values.values()])
    if accelerator.reduce((~finite).sum()) > 0:
        bad = [name for name, fine in zip(values, finite.tolist(), strict=True) if not fine]
        which = f" ({some_of(bad)})" if bad else ""
        raise NonFiniteLossError(
            f"weights became NaN or infinite by step {step}{which}: the loss was finite, its gradient was not"
        )


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights, under the names of the bare model, on the main process; to be called on every process."""
    state: dict[str, Any] = get_model_state_dict(model, options=WHOLE)
    return state


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state by names of parameters, on the main process; to be called on every process."""
    return dict(get_optimizer_state_dict(model, optimizer, options=WHOLE))


def restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    model_values: dict[str, Tensor],
    optimizer_values: dict[str, Any],
    state_spec: dict[str, Tensor],
    source: str,
) -> None:
    """Put both states back; to be called on every process.

    Args:
        state_spec: the bare model's state before it was wrapped, whose names, shapes and dtypes must fit.
        source: the file, for errors.
    """
    check_fit(model_values, state_spec, source, exact_dtype=True)
    groups = len(optimizer.param_groups)
    if len(optimizer_values["param_groups"]) != groups:
        raise CheckpointError(
            f"{source} has an optimiser of {len(optimizer_values['param_groups'])} parameter groups, "
            f"this one has {groups}"
        )
    # The fused steps of torch write as far as the weights reach, whatever the size of the state.
    for name, spec in state_spec.items():
        for key, value in optimizer_values["state"].get(name, {}).items():
            if key in SHAPED and value.shape != spec.shape:
                raise CheckpointError(
                    f"{source} does not fit the model: the optimiser's {key} of {name} has shape "
                    f"{tuple(value.shape)}, {name} has {tuple(spec.shape)}"
                )
    whole = StateDictOptions(full_state_dict=True)
    from_config = ("weight_decay", "lr_scale", "fused")
    configured = [{key: group[key] for key in from_config if key in group} for group in optimizer.param_groups]
    # The optimiser first: to make its state, torch lets it take a step of length zero.
    try:
        set_optimizer_state_dict(model, optimizer, optimizer_values, options=whole)
    except KeyError as error:
        raise CheckpointError(f"{source} has the state of another optimiser: no {error} in it") from error
    for group, own_values in zip(optimizer.param_groups, configured, strict=True):
        group.update(own_values)  # as configured now, like the learning rate, which the schedule sets
    set_model_state_dict(model, dict(model_values), options=whole)


def random_states() -> dict[str, Any]:
    """The state of every generator a training step draws from, as plain containers."""
    numpy: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [numpy[0], numpy[1].tolist(), *numpy[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo what was drawn since :func:`random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write the state (tensors, numbers, strings, plain containers) atomically, with its checksum."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    write_atomically(path, MAGIC + hashlib.sha256(data).hexdigest().encode() + data)


def read_state(path: Path) -> dict[str, Any]:
    """Read a state written by :func:`write_state`.

    Raises:
        FileNotFoundError: no such file. CheckpointError: not such a file, truncated or altered.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no training state at {path}")
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise CheckpointError(f"{path} is not a training state")
    digest, data = content[len(MAGIC) :][:DIGEST], content[len(MAGIC) + DIGEST :]
    if hashlib.sha256(data).hexdigest().encode() != digest:
        raise CheckpointError(f"{path} is truncated or altered: its checksum does not fit")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a strange file raises nearly anything: IndexError, OSError, struct.error, ...
        raise CheckpointError(f"{path} holds no training state: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no training state")
    return state


class TrainingStates:
    """The state files of a run, one per saving; the newest few are kept.

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
        write_state(new, state)
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
                read_state(path)
            except (CheckpointError, OSError) as error:  # damaged, or may not be read
                problems.append(str(error))
            else:
                return path, problems
        if problems:
            raise CheckpointError(f"no training state can be used: {'; '.join(problems)}")
        return None, problems


def compare_data(before: dict[str, Any], now: dict[str, Any], batch: int, source: str) -> list[str]:
    """What changed in the data since a state was saved, in words.

    Args:
        before: what a state remembers: ``class_names`` in the order of the outputs, and the numbers of
            ``training`` and ``validation`` images.
        now: the same of the data as they are.
        batch: batches done of the epoch under way.
        source: the state's file, for errors.

    Raises:
        CheckpointError: the classes are others, or in another order: outputs would mean something else.
    """
    old, new = before["class_names"], now["class_names"]
    if old != new:
        changes = {"new": [repr(name) for name in new if name not in old]}
        changes["missing"] = [repr(name) for name in old if name not in new]
        parts = [f"{what}: {some_of(names)}" for what, names in changes.items() if names]
        parts = parts or ["the same in another order"]
        raise CheckpointError(
            f"{source} was trained on {len(old)} classes, the data has {len(new)}; {', '.join(parts)}. Put the "
            "data back, or start a new run from these weights with --model.init-from and another --output"
        )
    remarks = [
        f"the data has {now[part]:,} {part} images, {before[part]:,} when the state was saved"
        for part in ("training", "validation")
        if now[part] != before[part]
    ]
    if now["training"] != before["training"] and batch:
        remarks.append(
            "the epoch under way is not what it would have been: some images come twice or not at all"
        )
    return remarks
