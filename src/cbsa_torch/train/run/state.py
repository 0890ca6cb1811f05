"""What a run must remember to go on exactly where it was: weights, optimiser, generators."""

from __future__ import annotations

import random
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

from cbsa_torch.models.checkpoint import CheckpointError, check_fit
from cbsa_torch.train.errors import NonFiniteLossError

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""Gather what is sharded: a file is the same however many processes wrote it."""


SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")
"""What torch's optimisers with a fused step remember of every weight."""


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
        which = f" ({', '.join(bad[:4])}{', ...' if bad[4:] else ''})" if bad else ""
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
    own: dict[str, Tensor],
    source: str,
) -> None:
    """Put both states back; to be called on every process.

    Args:
        own: the bare model's own state before it was wrapped, whose names, shapes and dtypes must fit.
        source: the file, for errors.
    """
    check_fit(model_values, own, source, exact_dtype=True)
    groups = len(optimizer.param_groups)
    if len(optimizer_values["param_groups"]) != groups:
        raise CheckpointError(
            f"{source} has an optimiser of {len(optimizer_values['param_groups'])} parameter groups, "
            f"this one has {groups}"
        )
    # The fused steps of torch write as far as the weights reach, whatever the size of the state.
    problems = [
        f"the optimiser's {key} of {name} has shape {tuple(value.shape)}, {name} has {tuple(own[name].shape)}"
        for name, values in optimizer_values["state"].items()
        for key, value in values.items()
        if name in own and isinstance(value, Tensor) and key in SHAPED and value.shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems[:8])}")
    whole = StateDictOptions(full_state_dict=True)
    settings = ("weight_decay", "lr_scale", "fused")
    configured = [{key: group[key] for key in settings if key in group} for group in optimizer.param_groups]
    # The optimiser first: to make its state, torch lets it take a step of length zero.
    try:
        set_optimizer_state_dict(model, optimizer, optimizer_values, options=whole)
    except KeyError as error:
        raise CheckpointError(f"{source} has the state of another optimiser: no {error} in it") from error
    for group, own_settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(own_settings)  # as configured now, like the learning rate, which the schedule sets
    set_model_state_dict(model, dict(model_values), options=whole)


def random_states() -> dict[str, Any]:
    """The state of every generator a training step draws from, as plain containers."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo what was drawn since :func:`random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
