"""Whether an optimiser can take a step here, tried before a run touches anything."""

from __future__ import annotations

import torch
from torch import nn

from cbsa_torch.train.config.base import OptimConfig
from cbsa_torch.train.engine.optim import make_optimizer
from cbsa_torch.train.errors import ConfigError


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
