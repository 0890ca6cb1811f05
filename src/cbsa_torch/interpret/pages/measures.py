"""Every measure that a page shows of a model, and for each that the model does not have, the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from cbsa_torch._core.checks import check_positive_int
from cbsa_torch.interpret.capture import attention_layers, named_modules
from cbsa_torch.interpret.certificate import Certificate
from cbsa_torch.interpret.certify import certificate
from cbsa_torch.interpret.rates import LayerRates, ReducedRates, measure_rates
from cbsa_torch.interpret.robustness import Robustness, robustness
from cbsa_torch.interpret.structure import (
    AttentionRanks,
    Sparsity,
    attention_ranks,
    ista_sparsity,
    subspace_coherence,
)
from cbsa_torch.nn import CBSA, ISTA, TokenMixer
from cbsa_torch.nn.ista import FusedISTA

SIGMAS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Standard deviations of the noise on the parameters."""

T = TypeVar("T")


class Measures(NamedTuple):
    """What was measured of one model; None where a measure does not exist for it."""

    rates: LayerRates
    reduced: ReducedRates | None
    certificate: Certificate | None
    """Of a model with certified steps."""
    steps: dict[str, list[float]]
    """kappa of every head, of the layers that have one: as learned; of certified steps the mean over images."""
    ranks: AttentionRanks | None
    coherence: dict[str, Tensor] | None
    sparsity: Sparsity | None
    robustness: Robustness | None
    robustness_metric: str
    """What the robustness curve shows, in words."""
    robustness_images: int
    missing: dict[str, str]
    """Measure to the reason why it was left out."""
    notes: list[str]
    """Sentences about how to read the rates of this model."""


def measure_model(
    model: nn.Module,
    images: Tensor,
    *,
    labels: Sequence[int] | None = None,
    batch_size: int = 64,
    robustness_images: int = 128,
) -> Measures:
    """Measure a model on images; arguments and errors are those of :func:`cbsa_torch.interpret.report`."""
    check_positive_int("batch_size", batch_size)
    if isinstance(robustness_images, bool) or not isinstance(robustness_images, int):
        raise TypeError(f"robustness_images must be an int, got {robustness_images!r}")
    if robustness_images < 0:
        raise ValueError(f"robustness_images must be at least 0, got {robustness_images}")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels must be those of images: got {len(labels)} labels and {len(images)} images")
    missing: dict[str, str] = {}

    def measured(name: str, reason: str | None, function: Callable[[], T]) -> T | None:
        if reason is None:
            try:
                return function()
            except ValueError as error:  # a measure refuses what it is not defined for, and says why
                reason = str(error)
        missing[name] = reason
        return None

    batches = images.split(batch_size)
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, TokenMixer)}
    layers = f"the attention here is {', '.join(sorted(kinds)) or 'of another library'}"
    no_cbsa = None if _has(model, CBSA) else f"only CBSA contracts representatives; {layers}"
    no_ista = None if _has(model, ISTA, FusedISTA) else "the model has no ISTA"
    shared = any(isinstance(module, TokenMixer) and module.shared_qkv for module in model.modules())
    no_bases = None if shared else "queries, keys and values have bases of their own"
    rates = measure_rates(model, batches)
    steps = _steps(model, rates.reduced)
    if not steps:
        missing["steps"] = f"there is no learned step; {layers}"
    certified = any(isinstance(module, CBSA) and module.step == "certified" for module in model.modules())
    few = images[:robustness_images]
    off = "switched off" if robustness_images == 0 else _no_classes(model, images)
    return Measures(
        rates=rates.coding,
        reduced=measured("reduced", no_cbsa, lambda: rates.reduced),
        certificate=certificate(model, batches) if certified else None,
        steps=steps,
        ranks=measured("ranks", no_cbsa, lambda: attention_ranks(model, batches)),
        coherence=measured("coherence", no_bases, lambda: subspace_coherence(model)),
        sparsity=measured("sparsity", no_ista, lambda: ista_sparsity(model, batches)),
        robustness=measured(
            "robustness",
            off,
            lambda: robustness(model, _metric(model, few, labels, batch_size), sigmas=SIGMAS),
        ),
        robustness_metric="accuracy" if labels is not None else "share of predictions that stay the same",
        robustness_images=len(few),
        missing=missing,
        notes=_notes(model, rates.coding.layers),
    )


def _steps(model: nn.Module, reduced: ReducedRates | None) -> dict[str, list[float]]:
    """The step kappa of every head, by layer: the parameter, or what was measured of a certified step."""
    measured = {} if reduced is None else dict(zip(reduced.layers, reduced.step_tokens, strict=True))
    steps = {}
    for name, module in named_modules(model):
        if isinstance(module, CBSA) and module.step == "certified" and name in measured:
            steps[name] = measured[name]
        elif isinstance(module, TokenMixer) and isinstance(
            step := getattr(module, "step_tokens", None), Tensor
        ):
            steps[name] = step.detach().float().cpu().tolist()
    return steps


def _notes(model: nn.Module, measured: list[str]) -> list[str]:
    """A sentence about the ``measured`` layers that have no one basis of the tokens, if there are any."""
    modules = attention_layers(model)
    separate = [name for name in measured if not getattr(modules[name], "shared_qkv", False)]  # timm's are, too
    if not separate:
        return []
    if len(separate) == len(measured):
        which = "The layers of this model project"
    else:
        numbers = ", ".join(str(measured.index(name) + 1) for name in separate)
        which = f"Layer {numbers} projects" if len(separate) == 1 else f"Layers {numbers} project"
    return [
        f"{which} queries, keys and values separately, so there is no one basis U of the tokens: "
        "the rates are of the queries."
    ]


def _has(model: nn.Module, *kinds: type[nn.Module]) -> bool:
    return any(isinstance(module, kinds) for module in model.modules())


@torch.no_grad()
def _no_classes(model: nn.Module, images: Tensor) -> str | None:
    """Why there are no predictions to compare under noise; None if there are."""
    output = model(images[:1])
    if isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] > 1:
        return None
    return "the model's output is not (images, classes)"


def _metric(
    model: nn.Module, images: Tensor, labels: Sequence[int] | None, batch_size: int
) -> Callable[[nn.Module], float]:
    """The accuracy on ``images``; without labels, the share of predictions that are those of ``model``."""

    @torch.no_grad()
    def predict(module: nn.Module) -> Tensor:
        return torch.cat([module(batch).argmax(-1).cpu() for batch in images.split(batch_size)])

    expected = predict(model) if labels is None else torch.tensor(labels[: len(images)])
    return lambda module: (predict(module) == expected).double().mean().item()
