"""Accelerate, set up: processes, precision, sharding, and data in an order that a run can be resumed in.

Besides, what models need for it: weights laid out for speed, and batch norms that see all processes.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

from cbsa_torch.nn.batch_norm import normalize_together
from cbsa_torch.parallel import context_parallel
from cbsa_torch.train.errors import ConfigError

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def new_accelerator(**options: Any) -> Accelerator:
    """An Accelerator with these options, whatever an earlier run in this process used.

    Its process group stays, as it can be made only once in a process: see ``leave_process_group``.

    Raises:
        ConfigError: fp16 on the CPU, where Accelerate would silently compute in float32.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(**options)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("engine.precision fp16 needs a GPU; on the CPU, bf16 is the mixed precision")
    return accelerator


def leave_process_group() -> None:
    """Destroy the process group, once, at the end of a process that trained or evaluated beside others.

    Without it the process may abort at its exit, while its communication threads still run. Call it only on
    success: after an error of one process ``destroy_process_group`` can deadlock, as it waits for the others.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # wrapped models hold the group, and lie in cycles
        torch.distributed.destroy_process_group()


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


class Replicas(NamedTuple):
    """Groups of processes that see the same images or slides, each a part of them (context parallel)."""

    number: int
    """How many groups there are."""
    own: int
    """Which this process is in."""
    group: torch.distributed.ProcessGroup | None
    """The processes of this one; None if they share nothing."""


def replicas(accelerator: Accelerator, shared: int) -> Replicas:
    """Groups of ``shared`` neighbouring processes.

    Raises:
        ConfigError: that does not divide the processes.
    """
    processes = accelerator.num_processes
    if processes % shared:
        raise ConfigError(
            f"engine.context_parallel ({shared}) must divide the number of processes, {processes}; start them "
            "by accelerate launch or torchrun"
        )
    if shared == 1:
        return Replicas(processes, accelerator.process_index, None)
    mesh = init_device_mesh(accelerator.device.type, (processes // shared, shared), mesh_dim_names=("dp", "cp"))
    return Replicas(processes // shared, accelerator.process_index // shared, mesh["cp"].get_group())


def share_tokens(model: nn.Module, replica: Replicas) -> None:
    """Let the processes of a replica share the rows of images, or the tiles of slides.

    Raises:
        ConfigError: the model cannot.
    """
    if replica.group is None:
        return
    try:
        context_parallel(model, replica.group)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"engine.context_parallel is not for this model: {error}") from error


@contextlib.contextmanager
def whole_inputs(model: nn.Module) -> Iterator[None]:
    """Let every process have whole images or slides for a while: evaluation spreads these, not their parts."""
    ranks = getattr(model, "ranks", None)
    if ranks is None:
        yield
        return
    context_parallel(model, None)
    try:
        yield
    finally:
        model.set_context_parallel(ranks)  # type: ignore[operator]


def prepare_for_replicas(accelerator: Accelerator, loader: DataLoader[Any], replica: Replicas) -> Any:
    """``accelerator.prepare`` of a loader, for which each replica is one process."""
    if replica.group is None:
        return accelerator.prepare(loader)
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=replica.number,
        process_index=replica.own,
        put_on_device=accelerator.device_placement,
        rng_types=list(accelerator.rng_types or ()),
        dispatch_batches=accelerator.dispatch_batches,
        even_batches=accelerator.even_batches,
        use_seedable_sampler=accelerator.use_seedable_sampler,
        data_seed=accelerator.dataloader_config.data_seed,
    )


def use_separate_generator(loader: DataLoader[Any]) -> None:
    """Let a loader draw the seeds of its workers from a generator of its own, not from that of the model."""
    loader.generator = torch.Generator()


def on_main(accelerator: Accelerator, work: Callable[[], T], expected: tuple[type[Exception], ...]) -> T:
    """What ``work`` gives on the main process; to be called on every process, which all wait for it.

    Raises:
        Exception: what the main process met, if it is one of ``expected``; on every process.
    """
    done: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            done[0] = work()
        except expected as error:
            done[1] = error
    result, failure = broadcast_object_list(done)
    if failure is not None:
        raise failure
    return result


def to_channels_last(model: M) -> M:
    """Lay the weights of 2-D convolutions out with their channels last, in place; returns the model.

    Convolutions then give their tokens in the order that attention reads them: ``flatten(2).transpose(1, 2)``
    of the stem's output is a view and stays contiguous. To be called before the optimiser, the average (EMA)
    and the wrapper of Accelerate are made. Not under FSDP2, which takes contiguous parameters only.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return model


class CPUSyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose training statistics are those of the images of all processes together."""

    process_group = None  # as torch's SyncBatchNorm has it: all processes

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, height, width)``; the batch may differ in size between processes."""
        return normalize_together(self, x) if self.training else super().forward(x)


class CPUSyncBatchNormAct2d(BatchNormAct2d):
    """The same of timm's batch norm with an activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, height, width)``, drop, activate."""
        activated: Tensor = (
            self.act(self.drop(normalize_together(self, x))) if self.training else super().forward(x)
        )
        return activated


SYNCHRONIZED: dict[type, type] = {nn.BatchNorm2d: CPUSyncBatchNorm2d, BatchNormAct2d: CPUSyncBatchNormAct2d}


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let every 2-D batch norm of ``model`` see the images of all processes; for several processes only."""
    if device.type != "cpu":
        # timm's, not torch's: that one would replace a batch norm with an activation by one without
        synchronized: nn.Module = convert_sync_batchnorm(model)
        return synchronized
    for module in model.modules():
        # The same parameters and state, another forward: names of the state dict stay.
        module.__class__ = SYNCHRONIZED.get(type(module), type(module))
    return model
