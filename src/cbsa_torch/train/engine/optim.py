"""timm's optimisers, schedules and weight averaging, from the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from cbsa_torch._core.checks import nearest
from cbsa_torch.train.config import OptimConfig
from cbsa_torch.train.errors import ConfigError


def make_optimizer(
    model: nn.Module,
    config: OptimConfig,
    lr_scales: Mapping[str, float] = MappingProxyType({}),
    *,
    sharded: bool = False,
) -> torch.optim.Optimizer:
    """The optimiser, with weight decay on matrices only unless ``decay_everything``.

    Torch's one-kernel step is used where torch has one (AdamW, Adam, SGD, Adagrad): see
    ``benchmarks/profile_step.py`` for what it saves. Lion is timm's, and has none.

    Args:
        lr_scales: factors on the learning rate, by parameter, none of which decays.
        sharded: the model's parameters will be sharded (FSDP2).
    """
    known = list_optimizers()
    if config.name not in known:
        raise ConfigError(
            f"optim.name must be an optimiser of timm, got {config.name!r}{nearest(config.name, known)}"
        )
    fused = has_fused(config.name, sharded=sharded)
    optimizer = create_optimizer_v2(
        _groups(model, config, lr_scales),
        opt=config.name,
        lr=config.lr,
        weight_decay=config.weight_decay,
        **({"fused": True} if fused else {}),
    )
    if fused:
        _keep_layouts(optimizer)
    return optimizer


def _groups(model: nn.Module, config: OptimConfig, lr_scales: Mapping[str, float]) -> Any:
    """What timm takes: a model, parameters, or groups of them with options."""
    if not lr_scales:
        # given the model, timm asks it which parameters should not decay
        return model.parameters() if config.decay_everything else model
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scaled = {named[name]: scale for name, scale in lr_scales.items() if name in named}
    if config.decay_everything:
        groups: list[dict[str, Any]] = [{"params": list(named.values())}]
    else:
        spared: set[str] = getattr(model, "no_weight_decay", set)()
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=spared)
    for group in groups:
        group["params"] = [p for p in group["params"] if p not in scaled]
    for scale in sorted(set(scaled.values())):
        own = [p for p, factor in scaled.items() if factor == scale]
        # timm's schedulers multiply by lr_scale
        groups.append({"params": own, "weight_decay": 0.0, "lr_scale": scale})
    return [group for group in groups if group["params"]]


def has_fused(name: str, *, sharded: bool = False) -> bool:
    """Whether the optimiser ``name`` of timm is one of torch's with a fused step (for sharded parameters)."""
    cls = get_optimizer_info(name).opt_class
    if isinstance(cls, str):  # of another package, not imported before it is used
        return False
    if sharded and cls not in (torch.optim.Adam, torch.optim.AdamW):
        return False  # the kernels of the others do not know shards (torch 2.14)
    return cls.__module__.startswith("torch.optim") and "fused" in inspect.signature(cls).parameters


def _keep_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Give gradients, and states that are loaded, the strides of their parameters.

    Torch's fused steps on the CPU go through the memory of all of them at once and never look at strides: a
    state saved for channels-first weights would silently move channels-last weights the wrong way (torch 2.14).
    """

    def align_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad = _laid_out_like(parameter.grad, parameter)

    def align_states(optimizer: torch.optim.Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[key] = _laid_out_like(value, parameter)

    optimizer.register_step_pre_hook(align_gradients)
    optimizer.register_load_state_dict_post_hook(align_states)


def _laid_out_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def make_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, steps_per_epoch: int) -> Any:
    """Linear warm-up, then the schedule; a function of the step number alone, hence resumable."""
    warmup = min(config.warmup_epochs, config.epochs)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        decay_rate=config.poly_power,  # timm's name for the power; a cosine has none
        num_epochs=max(config.epochs - warmup, 1),
        warmup_epochs=warmup,
        warmup_prefix=True,  # the schedule starts from lr, after the warm-up
        warmup_lr=min(config.warmup_lr, config.lr),
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def check_optimizer(config: OptimConfig, device: torch.device) -> None:
    """Let the optimiser take one step on a model of two layers.

    Some that timm lists need a package or a GPU that is not here, or gradients of gradients, and say so only
    when they are made or used.

    Raises:
        ConfigError: timm does not know it, or it cannot be used.
    """
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).to(device)
        try:
            optimizer = make_optimizer(model, config)
            model(torch.ones(1, 4, device=device)).sum().backward()
            optimizer.step()
        except ConfigError:
            raise
        except Exception as error:  # of any package that timm knows
            raise ConfigError(f"optim.name {config.name!r} cannot be used here: {error}") from error
