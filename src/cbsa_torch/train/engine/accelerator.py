"""Accelerate, set up: processes, precision, sharding, and data in an order that a run can be resumed in."""

from __future__ import annotations

import gc
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from torch.utils.data import DataLoader

from cbsa_torch.train.config.base import EngineConfig
from cbsa_torch.train.data import set_epoch
from cbsa_torch.train.errors import ConfigError


def new_accelerator(**settings: Any) -> Accelerator:
    """An Accelerator with these settings, whatever an earlier run in this process used.

    Its process group stays, as it can be made only once in a process: see ``leave_process_group``.

    Raises:
        ConfigError: fp16 on the CPU, where Accelerate would silently compute in float32.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(**settings)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("engine.precision fp16 needs a GPU; on the CPU, bf16 is the mixed precision")
    return accelerator


def leave_process_group() -> None:
    """To be called once, at the end of a process that trained or evaluated beside others.

    Without it the process may abort at its exit, while its communication threads still run. Not after an
    error of one process: it could wait there for the others, and the launcher, which ends them, for it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # wrapped models hold the group, and lie in cycles
        torch.distributed.destroy_process_group()


def training_settings(config: EngineConfig, seed: int) -> dict[str, Any]:
    """What :func:`new_accelerator` needs for training."""
    return {
        "mixed_precision": config.precision,
        "cpu": config.cpu,
        "gradient_accumulation_steps": config.accumulate,
        "step_scheduler_with_optimizer": False,
        # The order of an epoch follows from the seed and its number alone.
        "dataloader_config": DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
    }


def shard(accelerator: Accelerator, model: nn.Module) -> None:
    """Let ``accelerator.prepare`` shard a model (FSDP2): every block by itself, then the rest.

    Raises:
        ConfigError: there is one process only.
    """
    if accelerator.num_processes == 1:
        raise ConfigError("engine.fsdp needs several processes: start it by accelerate launch or torchrun")
    blocks = sorted({type(block).__name__ for block in getattr(model, "blocks", ())})
    # Accelerate shards on GPUs only. The state that says so is shared by everything of it.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap" if blocks else "no_wrap",
        transformer_cls_names_to_wrap=blocks or None,
        cpu_ram_efficient_loading=False,
    )
    # Mixed precision is autocast's, as without sharding: a policy of the plugin would make the weights of batch
    # norms bf16, which torch does not take beside their float32 statistics.
    accelerator.state.fsdp_plugin = plugin


def draw_apart(loader: DataLoader[Any]) -> None:
    """Let a loader draw the seeds of its workers from a generator of its own, not from that of the model."""
    loader.generator = torch.Generator()


def start_epoch(accelerator: Accelerator, loader: DataLoader[Any], epoch: int, batch: int) -> DataLoader[Any]:
    """The batches of an epoch from number ``batch`` (from 0) on, shuffled and augmented as that epoch is.

    Args:
        epoch: from 0.
        batch: how many batches were seen already; they are not read again.
    """
    set_epoch(loader, epoch)
    return accelerator.skip_first_batches(loader, batch) if batch else loader
