"""Whole models: images per second at several resolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

import cbsa_torch.models  # noqa: F401  (registers our models with timm)
from cbsa_torch.bench import measure
from cbsa_torch.bench.baselines import LowerBound, NaiveCBSA
from cbsa_torch.bench.layers import LOWER_BOUND, NAIVE

MODELS = tuple(
    name.format(size)
    for size in ("tiny", "small")
    for name in (
        "cbt_{}_patch16_224",
        "cbt_{}_patch16_224 impl=eager",
        "cbt_{}_patch16_224 impl=tiled",
        "cbt_{}_patch16_224 attn=naive",
        "cbt_{}_patch16_224 attn=lower_bound",
        "vit_{}_patch16_224",
        "crate_{}_patch16_224",
        "tost_{}_patch16_224",
        "agent_{}_patch16_224",
    )
)
"""Measured by default: five families in two sizes; ViT is timm's."""


class ModelRow(NamedTuple):
    """One model at one resolution in one pass."""

    name: str
    image_size: int
    batch: int
    training: bool
    milliseconds: float
    """Median of a batch."""
    images_per_second: float
    peak_mib: float
    """Memory at the worst moment, beyond parameters and input."""
    saved_mib: float | None
    """What training keeps for the backward pass, the output included."""


def compare(
    models: Sequence[str] = MODELS,
    *,
    image_sizes: Sequence[int] = (224, 512),
    batches: Sequence[int] = (8, 2),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    repetitions: int = 5,
    budget: float = 10.0,
    progress: Callable[[str], None] = lambda message: None,
) -> list[ModelRow]:
    """Measure inference and a training step (forward and backward) of every model.

    Args:
        models: timm names, optionally followed by ``impl=NAME``, ``attn=lower_bound`` or ``attn=naive``.
        image_sizes: sides of square images.
        batches: images per batch, for each size.
        device: "cpu" or "cuda".
        dtype: of parameters and images.
        repetitions: calls that count, at most.
        budget: seconds for one model in one pass.
        progress: is told what comes next.
    """
    rows = []
    factory_kwargs: Any = {"device": device, "dtype": dtype}
    for image_size, batch in zip(image_sizes, batches, strict=True):
        for training in (False, True):
            progress(f"{image_size} x {image_size}, {'training step' if training else 'inference'}")
            built: dict[str, nn.Module] = {
                name: _create(name, image_size).to(**factory_kwargs).train(training) for name in models
            }
            functions: dict[str, partial[Any]] = {}
            for name, model in built.items():
                channels = resolve_model_data_config(model)["input_size"][0]
                x = torch.randn(
                    batch, channels, image_size, image_size, requires_grad=training, **factory_kwargs
                )
                if training:
                    gradient = torch.ones_like(measure.forward(model, x))
                    functions[name] = partial(measure.step, model, x, gradient)
                else:
                    functions[name] = partial(measure.forward, model, x)
            times = measure.interleaved(functions, device, repetitions=repetitions, budget=budget)
            for name, seconds in measure.medians(times).items():
                built[name].zero_grad(set_to_none=True)
                peak = measure.memory(functions[name], device).peak
                saved = None
                if training:
                    built[name].zero_grad(set_to_none=True)
                    model, x = built[name], functions[name].args[1]
                    saved = measure.memory(partial(model, x), device).left / 2**20
                milliseconds, rate = 1e3 * seconds, batch / seconds
                rows.append(
                    ModelRow(name, image_size, batch, training, milliseconds, rate, peak / 2**20, saved)
                )
                built[name].zero_grad(set_to_none=True)
    return rows


def _create(name: str, image_size: int) -> nn.Module:
    """A timm model; ``NAME impl=tiled`` sets an option, ``NAME attn=naive`` puts a baseline in every block."""
    name, _, variant = name.partition(" ")
    option, _, value = variant.partition("=")
    options = {"impl": value} if option == "impl" else {}
    model: nn.Module = timm.create_model(name, img_size=image_size, **options)
    if option == "attn":
        blocks: Any = model.get_submodule("blocks")
        for block in blocks:
            block.attn = BASELINES[value](block.attn.dim, block.attn.num_heads)
    return model


BASELINES: dict[str, Callable[[int, int], nn.Module]] = {LOWER_BOUND: LowerBound, NAIVE: NaiveCBSA}
