"""Model files: safetensors with what is needed to rebuild the model; foreign files read without executing.

A checkpoint of ours is one ``.safetensors`` file: the weights, and in its metadata the timm model name, the
constructor arguments and whatever the writer adds (class names, accuracy). It is replaced atomically.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cbsa_torch._core.files import write_atomically
from cbsa_torch._core.wrappers import bare_state
from cbsa_torch.nn.fused import Fused

KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
"""Where training checkpoints keep the weights; an average of them, which is what was evaluated, comes first."""
PICKLE_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".ckpt")

FETCHING_ARGS = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_encoder",
    "pretrained_base",
    "checkpoint_path",
    "cache_dir",
}
"""Arguments of ``timm.create_model`` that read other files or the network: refused in a file's metadata."""


def refuse_fetching(
    name: str, args: Mapping[str, Any], instead: str, error: type[ValueError] = ValueError
) -> None:
    """Raise ``error`` if ``args``, an argument called ``name``, would read other files or the network."""
    refused = FETCHING_ARGS.intersection(args)
    if refused:
        raise error(f"{name} must not hold {', '.join(sorted(refused))}: {instead}")


class CheckpointError(ValueError):
    """A file that is not the checkpoint it should be; nothing of it was executed or kept."""


def save_checkpoint(path: str | Path, model: nn.Module, info: dict[str, Any]) -> None:
    """Save weights and ``info`` to a ``.safetensors`` file, atomically.

    ``info`` must hold ``model`` (the timm name) and ``model_args`` (its constructor arguments) for
    :func:`load_checkpoint`; it must be JSON. A model whose image size or head was changed after it was
    built needs the new ``img_size`` or ``num_classes`` in ``model_args``. Names of wrappers (``torch.compile``,
    DDP, FSDP, averages of weights) are left out of the file.

    Raises:
        CheckpointError: ``info`` does not name a timm model and its arguments, the weights are not of that
            model, the model is fused, or ``path`` has another suffix; nothing is written. TypeError: ``info``
            is not JSON.

    Examples:
        >>> import timm
        >>> from cbsa_torch.models import load_checkpoint, save_checkpoint
        >>> model = timm.create_model("cbt_pico_patch1_8", num_classes=3)
        >>> info = {"model": "cbt_pico_patch1_8", "model_args": {"num_classes": 3}}
        >>> save_checkpoint("mine.safetensors", model, info)
        >>> load_checkpoint("mine.safetensors")[0].num_classes
        3
    """
    fused = [name for name, module in model.named_modules() if isinstance(module, Fused)]
    if fused:
        raise CheckpointError(
            f"the model for {path} is fused for inference (e.g. {fused[0]}), and a file holds the weights that "
            "it was made from; save it before fusing, and fuse after loading"
        )
    save_tensors(path, model.state_dict(), info)


def save_tensors(path: str | Path, state: dict[str, Tensor], info: dict[str, Any]) -> None:
    """:func:`save_checkpoint` of a state dict, for models whose weights lie on several processes."""
    if Path(path).suffix != ".safetensors":
        raise CheckpointError(f"a checkpoint is a .safetensors file, got {path}")
    _check_info(info, str(path))
    text = json.dumps(info)
    source = f"what is to be written to {path}"
    tensors = _as_written(_bare(state, source))
    with torch.device("meta"):  # no values, no random numbers
        own = build_described(info, source).state_dict()
    check_fit(tensors, own, source)
    metadata = {"cbsa_torch": text, "sha256": _digest(tensors, text)}
    write_atomically(Path(path), save(tensors, metadata=metadata))


def _as_written(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, each in memory of its own, which tied parameters share and safetensors refuses."""
    written: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        written[name] = tensor.clone() if memory in taken else tensor
        taken.add(memory)
    return written


def build_described(info: Mapping[str, Any], source: str) -> nn.Module:
    """The model that a file's description names."""
    try:
        model: nn.Module = timm.create_model(info["model"], **info["model_args"])
    except Exception as error:  # constructors of any model of timm, called with anything
        raise CheckpointError(f"cannot build the model {info['model']!r} of {source}: {error}") from error
    return model


def load_checkpoint(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the model of a file written by :func:`save_checkpoint`, in eval mode on the CPU.

    Returns:
        The model and the ``info`` saved with it.

    Raises:
        FileNotFoundError: no such file. CheckpointError: not such a file, truncated, or of another model.

    Examples:
        >>> from cbsa_torch.models import load_checkpoint
        >>> model, info = load_checkpoint("runs/photos/model.safetensors")
        >>> info["model"], info["class_names"]
        ('cbt_nano_patch4_32', ['blue', 'green', 'red'])
    """
    path = Path(path)
    tensors = read_tensors(path)
    info = read_info(path)
    metadata = _metadata(path)
    if "sha256" in metadata and _digest(tensors, metadata["cbsa_torch"]) != metadata["sha256"]:
        raise CheckpointError(f"{path} was altered after it was written: its checksum does not fit")
    model = build_described(info, str(path))
    model.to(floating_dtype(tensors))
    load_strictly(model, tensors, str(path))
    return model.eval(), info


def floating_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """The narrowest dtype that holds every floating-point tensor exactly; float32 without any."""
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def read_info(path: Path) -> dict[str, Any]:
    """The ``info`` of a file written by :func:`save_checkpoint`."""
    try:
        info = json.loads(_metadata(path)["cbsa_torch"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} was not written by cbsa_torch (no model description in it); for weights of others use "
            "from_pretrained"
        ) from error
    _check_info(info, str(path))
    return info


def is_ours(path: Path) -> bool:
    """Whether this library wrote a file; True of a damaged ``.safetensors``, as loading says what is wrong."""
    if path.suffix != ".safetensors":
        return False
    try:
        return "cbsa_torch" in _metadata(path)
    except SafetensorError:
        return True


def _metadata(path: Path) -> dict[str, str]:
    with _named(path) as name, safe_open(name, framework="pt") as file:
        return file.metadata() or {}


@contextmanager
def _named(path: Path) -> Iterator[str]:
    """A name by which safetensors opens a file: it takes names in UTF-8 only."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        with path.open("rb") as file:
            yield f"/dev/fd/{file.fileno()}"
    else:
        yield str(path)


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    """A checksum of a file's description and tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_info(info: Any, source: str) -> None:
    """The description must name one of timm's models, with arguments that fetch nothing from elsewhere."""
    if not isinstance(info, dict) or not {"model", "model_args"} <= info.keys():
        raise CheckpointError(f"{source} does not say which model it holds (model, model_args)")
    name, args = info["model"], info["model_args"]
    if not isinstance(name, str) or not timm.is_model(name):
        raise CheckpointError(f"{source} holds {name!r}, which is not a model of timm here")
    if not isinstance(args, dict) or FETCHING_ARGS & args.keys():
        raise CheckpointError(f"{source} has model_args that are not allowed in a file: {args!r}")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from safetensors or from a PyTorch file, tensors only.

    Pickled code is never executed: PyTorch files are read with ``weights_only=True``. Training checkpoints
    that keep the weights under one of ``KEYS`` are unwrapped, those that keep an average of them as well give
    that; names of wrappers (DDP, FSDP, ``torch.compile``, averages) are stripped.

    Raises:
        FileNotFoundError: no such file. CheckpointError: unreadable, unsafe, or without tensors.

    Examples:
        >>> from cbsa_torch.models import read_tensors
        >>> read_tensors("runs/photos/model.safetensors")["head.weight"].shape
        torch.Size([3, 16])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        try:
            with _named(path) as name:
                tensors = load_file(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
        return unwrap(tensors, str(path))
    if path.suffix not in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{path} must be a .safetensors file or a PyTorch file ({', '.join(PICKLE_SUFFIXES)})"
        )
    try:
        # the options of a command line, which training checkpoints keep; building them runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]):
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
    """Find the state dict in what a checkpoint file held, and strip the names of wrappers."""
    for key in KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{source} holds no state dict")
    return _bare(content, source)


def _bare(state: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
    """A state dict whose values are plain tensors, without names of wrappers."""
    stray = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if stray:
        raise CheckpointError(
            f"{source} holds entries that are not tensors: {', '.join(stray[:5])}; weights are tensors by "
            f"name, alone or under one of the keys {', '.join(KEYS)}"
        )
    odd = [str(key) for key, value in state.items() if not _is_plain(value)]
    if odd:
        raise CheckpointError(
            f"{source} holds tensors that are not dense, whole and of 16 bit or more: {odd[:5]}; gather what "
            "is sharded over processes, and dequantise what is quantised"
        )
    try:
        return bare_state({str(key): value for key, value in state.items()})
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _is_plain(tensor: Tensor) -> bool:
    """Dense, with values behind every element, and of a dtype that takes part in type promotion."""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):  # sharded over processes, or quantised
        return False
    if tensor.layout != torch.strided or tensor.is_meta or (tensor.is_floating_point() and tensor.itemsize < 2):
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def load_strictly(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load ``tensors`` into ``model``; every name and shape must fit, else one error lists what does not."""
    check_fit(tensors, model.state_dict(), source)
    model.load_state_dict(tensors)


def check_fit(
    tensors: dict[str, Tensor], own: dict[str, Tensor], source: str, *, exact_dtype: bool = False
) -> None:
    """Compare names, shapes and kinds of numbers (or, with ``exact_dtype``, dtypes) with a model's ``own``."""
    missing = [f"missing {name}" for name in own if name not in tensors]
    unexpected = [f"unexpected {name}" for name in tensors if name not in own]
    others = []
    for name, needed in own.items():
        given = tensors.get(name, needed)
        other_dtype = given.dtype != needed.dtype
        if other_dtype and (exact_dtype or given.is_floating_point() != needed.is_floating_point()):
            others.append(f"{name} is {given.dtype}, the model needs {needed.dtype}")
        if given.shape != needed.shape:
            others.append(f"{name} has shape {tuple(given.shape)}, the model needs {tuple(needed.shape)}")
    if missing or unexpected or others:
        shown = "; ".join([*_few(missing), *_few(unexpected), *_few(others)])
        raise CheckpointError(f"{source} does not fit the model: {shown}")


def _few(problems: list[str], most: int = 4) -> list[str]:
    return problems[:most] + ([f"and {len(problems) - most} more"] if len(problems) > most else [])
