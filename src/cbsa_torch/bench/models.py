"""Whole models: images per second at several resolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from timm.utils import reparameterize_model
from torch import nn

from cbsa_torch.bench import measure
from cbsa_torch.bench.baselines import NaiveCBT, Nystrom
from cbsa_torch.models.registry import SIZES, model_name

NAIVE, OFFICIAL, NYSTROM = "naive_", "official_", "nystrom_"
"""Before the name of a CBT: :class:`NaiveCBT` of its size, the second with three products in ISTA; before a
ViT: :class:`Nystrom` in it."""
MODELS = (
    "naive_cbt_small_patch16_224",
    "cbt_small_patch16_224",
    "vit_small_patch16_224",
    "nystrom_vit_small_patch16_224",
    "crate_small_patch16_224",
    "tost_small_patch16_224",
    "agent_small_patch16_224",
)
"""Measured by default; ViT is timm's."""


class ModelSize(NamedTuple):
    """A batch of square images.

    Examples:
        >>> from cbsa_torch.bench.models import ModelSize
        >>> ModelSize(batch=32, side=224)
        ModelSize(batch=32, side=224)
    """

    batch: int
    side: int
    """In pixels."""


class ModelRow(NamedTuple):
    """One model at one size in one pass.

    Examples:
        >>> from cbsa_torch.bench.models import ModelSize, compare
        >>> size = ModelSize(batch=2, side=8)
        >>> row = compare(["cbt_pico_patch1_8"], sizes=[], step_sizes=[size], repetitions=1, budget=0.01)[0]
        >>> row.image_size, row.training
        (8, True)
    """

    name: str
    """``fused`` and ``compiled`` after it say what was done to the model."""
    batch: int
    image_size: int
    training: bool
    milliseconds: float
    """Median of a batch."""
    quartiles: tuple[float, float]
    """First and third, of the same."""
    repetitions: int
    images_per_second: float
    """By the median."""
    speedup: float
    """Images per second over those of the first model, as it is, in the same pass."""
    peak_mib: float
    """Memory at the worst moment, beyond parameters and input."""
    saved_mib: float | None
    """What training keeps for the backward pass, the output included."""


def compare(
    models: Sequence[str] = MODELS,
    *,
    sizes: Sequence[ModelSize],
    step_sizes: Sequence[ModelSize] = (),
    compiled: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    repetitions: int = 9,
    budget: float = 12.0,
    progress: Callable[[str], None] = lambda message: None,
) -> list[ModelRow]:
    """Measure inference and a training step (forward and backward, without optimiser) of every model.

    Those that can be fused for inference (:func:`timm.utils.reparameterize_model`) are measured so as well.

    Args:
        models: timm names, or ``naive_`` before that of a CBT, ``nystrom_`` before that of a timm ViT. The
            others are compared with the first.
        sizes: batches of images.
        step_sizes: further sizes, for training steps only.
        compiled: measure all by ``torch.compile`` as well.
        device: "cpu" or "cuda".
        dtype: of parameters and images.
        repetitions: calls that count, at most.
        budget: seconds for one model in one pass.
        progress: is told what comes next.

    Examples:
        >>> from cbsa_torch.bench.models import ModelSize, compare
        >>> size = ModelSize(batch=2, side=8)
        >>> rows = compare(["cbt_pico_patch1_8"], sizes=[], step_sizes=[size], repetitions=1, budget=0.01)
        >>> rows[0].name, rows[0].speedup
        ('cbt_pico_patch1_8', 1.0)
    """
    rows = []
    for training, size in [
        *((training, size) for size in sizes for training in (False, True)),
        *((True, size) for size in step_sizes),
    ]:
        title = f"{size.batch} x {size.side} x {size.side}, {'training step' if training else 'inference'}"
        progress(title)
        built: dict[str, nn.Module] = {}
        functions: dict[str, partial[Any]] = {}
        factory_kwargs: Any = {"device": device, "dtype": dtype}
        for name in models:
            model, channels = _create(name, size.side)
            model.to(**factory_kwargs).train(training)
            variants = {name: model}
            if not training and any(hasattr(module, "fuse") for module in model.modules()):
                variants[f"{name} fused"] = reparameterize_model(model)
            if compiled:
                variants |= {f"{key} compiled": _compile(variant) for key, variant in variants.items()}
            images = torch.randn(size.batch, channels, size.side, size.side, **factory_kwargs)
            run = measure.step if training else measure.forward
            built |= variants
            functions |= {key: partial(run, variant, images) for key, variant in variants.items()}
        for name in functions:
            if name.endswith(" compiled"):
                progress(f"{title}: compiling {name.removesuffix(' compiled')}")
                functions[name]()
        progress(title)
        times = measure.interleaved(functions, device, repetitions=repetitions, budget=budget)
        base = measure.quartiles(times[models[0]])[1]
        for name, function in functions.items():
            first, median, third = measure.quartiles(times[name])
            built[name].zero_grad(set_to_none=True)
            peak = measure.memory(function, device).peak / 2**20
            built[name].zero_grad(set_to_none=True)
            model, images = function.args
            saved = measure.memory(partial(model, images), device).left / 2**20 if training else None
            speeds = size.batch / median, base / median
            at = (name, size.batch, size.side, training)
            time = (1e3 * median, (1e3 * first, 1e3 * third), len(times[name]))
            rows.append(ModelRow(*at, *time, *speeds, peak, saved))
        torch.compiler.reset()  # else the models of the next size count as variants of these
    return rows


COMPARISONS = (
    (False, "CBT fused / naive", "cbt fused", "naive_cbt"),
    (False, "both compiled", "cbt fused compiled", "naive_cbt compiled"),
    (False, "CBT fused / ViT", "cbt fused", "vit"),
    (True, "CBT / naive", "cbt", "naive_cbt"),
    (True, "both compiled", "cbt compiled", "naive_cbt compiled"),
    (True, "CBT / ViT", "cbt", "vit"),
)
"""Whether in a training step, a heading, and whose images per second over whose."""


def ratios(rows: Sequence[ModelRow]) -> dict[ModelSize, list[float | None]]:
    """At every size the ratios of :data:`COMPARISONS`; None where one of the two was not measured.

    Examples:
        >>> from cbsa_torch.bench.models import ModelSize, compare, ratios
        >>> size = ModelSize(batch=2, side=8)
        >>> rows = compare(["cbt_pico_patch1_8"], sizes=[], step_sizes=[size], repetitions=1, budget=0.01)
        >>> ratios(rows)[size][0] is None  # of two that were not measured
        True
    """

    def milliseconds(size: ModelSize, training: bool, model: str) -> float | None:
        family, _, variant = model.partition(" ")
        own = (row for row in rows if (row.batch, row.image_size, row.training) == (*size, training))
        named = ((*row.name.partition(" "), row.milliseconds) for row in own)
        return next((ms for name, _, v, ms in named if name.startswith(f"{family}_") and v == variant), None)

    found: dict[ModelSize, list[float | None]] = {}
    for size in dict.fromkeys(ModelSize(row.batch, row.image_size) for row in rows):
        found[size] = []
        for training, _, faster, slower in COMPARISONS:
            ours, other = (milliseconds(size, training, model) for model in (faster, slower))
            found[size].append(other / ours if ours and other else None)
    return found


def is_known(name: str) -> bool:
    """Whether :func:`compare` can build a model of this name."""
    if name.startswith((NAIVE, OFFICIAL)):
        return name.partition("_")[2] in _CBT_SIZES
    plain = name.removeprefix(NYSTROM)
    return timm.is_model(plain) and (plain == name or plain.startswith("vit_"))


_CBT_SIZES = {model_name("cbt", key): size for key, size in SIZES.items()}


def _create(name: str, side: int) -> tuple[nn.Module, int]:
    """A model for images of this side, and their channels."""
    if name.startswith((NAIVE, OFFICIAL)):
        size = _CBT_SIZES[name.partition("_")[2]]
        given = {"in_chans": size.input_size[0], "num_classes": size.num_classes, **size.args}
        given["ista_products"] = 3 if name.startswith(OFFICIAL) else 2
        return NaiveCBT(**{**given, **size.mixer_defaults, "img_size": side}), size.input_size[0]
    model: nn.Module = timm.create_model(name.removeprefix(NYSTROM), img_size=side)
    if name.startswith(NYSTROM):
        blocks: Any = model.get_submodule("blocks")
        for block in blocks:
            block.attn = Nystrom(block.attn.qkv.in_features, block.attn.num_heads)
    return model, resolve_model_data_config(model)["input_size"][0]


def _compile(model: nn.Module) -> Any:
    return torch.compile(model, dynamic=False, fullgraph=True)  # one size in each pass
