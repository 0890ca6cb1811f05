"""Robustness of a model to noise on the parameters of its attention layers (the paper's Fig. 8)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cbsa_torch._core.checks import check_number
from cbsa_torch._core.precision import compute_dtype
from cbsa_torch.interpret.capture import attention_layers, choose_layers
from cbsa_torch.nn.fused import Fused

SIGMAS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Standard deviations from 1e-3 to 1, as in Fig. 8."""


class Robustness(NamedTuple):
    """A metric under noise.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import robustness
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> robustness(model, lambda noisy: 1.0, sigmas=[0.1], seeds=[0, 1], layers=[0])
        Robustness(sigmas=[0.1], values=[[1.0, 1.0]], clean=1.0, layers=['blocks.0.attn'])
    """

    sigmas: list[float]
    values: list[list[float]]
    """``[sigma][seed]``."""
    clean: float
    """Without noise."""
    layers: list[str]
    """Names of the attention layers that got noise."""


def noisy_copy(
    model: nn.Module, sigma: float, *, layers: Sequence[str | int] | None = None, seed: int = 0
) -> nn.Module:
    """A copy of ``model`` with Gaussian noise on every parameter of its attention layers.

    Each parameter p becomes p + sigma * n with n standard normal, drawn on the CPU by a generator of its own:
    the global one is left alone, and one seed gives the same n for every ``sigma`` and device. A parameter
    that several layers share gets noise once. Of an orthogonal layer the parameter behind the basis is
    changed, so that the basis stays orthonormal. Buffers and integer parameters get no noise.

    Args:
        model: a model with mixers of this library or timm's ``Attention``; left as it is.
        sigma: standard deviation, at least 0.
        layers: names or indices of the attention layers that get noise. Default: all.
        seed: of the noise.

    Raises:
        ValueError: ``sigma`` negative or not finite, no such layer, an orthogonal layer that is fused for
            inference. TypeError: ``sigma`` not a number, ``seed`` not an int. IndexError: no layer of that
            index.

    Examples:
        >>> from cbsa_torch import CBSA
        >>> from cbsa_torch.interpret import noisy_copy
        >>> model = torch.nn.Sequential(CBSA(64, 4))
        >>> noisy = noisy_copy(model, 0.1)
        >>> round((noisy[0].qkv.weight - model[0].qkv.weight).std().item(), 2)
        0.1
    """
    _check("sigma", sigma, "seed", seed)
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    chosen = choose_layers(attention_layers(noisy), layers)
    for name, layer in chosen.items():
        if any(isinstance(module, Fused) for module in layer.modules()):
            raise ValueError(
                f"{name} is fused for inference: noise would leave its basis alone, or not orthonormal; give "
                "the model that was fused"
            )
    unique = dict.fromkeys(p for layer in chosen.values() for p in layer.parameters() if p.is_floating_point())
    with torch.no_grad():
        for parameter in unique:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            wide = compute_dtype(parameter.dtype)  # half precision would round the noise before adding it
            parameter.copy_(parameter.to(wide) + sigma * noise.to(parameter.device, wide))
    return noisy


def robustness(
    model: nn.Module,
    metric: Callable[[nn.Module], float],
    *,
    sigmas: Sequence[float] = SIGMAS,
    seeds: Sequence[int] = (0, 1, 2),
    layers: Sequence[str | int] | None = None,
) -> Robustness:
    """Evaluate a metric without noise and under noise of every ``sigma`` and ``seed`` (Fig. 8).

    Args:
        model: a model with attention layers, left as it is (call ``.eval()`` first).
        metric: ``metric(model)`` gives a number, e.g. the accuracy on a validation set. It is called with
            ``model``, then with a :func:`noisy_copy` of it for every sigma and seed: it must evaluate the model
            that it is given.
        sigmas: standard deviations, each at least 0. Default: :data:`SIGMAS`.
        seeds: of the noise.
        layers: as in :func:`noisy_copy`.

    Raises:
        ValueError: no sigmas or seeds, a ``sigma`` that is negative or not finite, no such layer.
        TypeError: ``metric`` cannot be called or does not return a number, a wrong type of sigma or seed.
            IndexError: no layer of that index.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import robustness
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> images = torch.randn(8, 1, 8, 8)
        >>> found = robustness(model, lambda noisy: noisy(images).mean().item(), sigmas=[0, 0.1], seeds=[0])
        >>> len(found.values), found.values[0][0] == found.clean
        (2, True)
    """
    if not callable(metric):
        raise TypeError(f"metric must be callable, metric(model) -> float, got {type(metric).__name__}")
    sigmas, seeds = list(sigmas), list(seeds)
    if not sigmas or not seeds:
        raise ValueError(f"{'seeds' if sigmas else 'sigmas'} must hold at least one, got none")
    for sigma in sigmas:  # all of them before the metric, which may take hours
        for seed in seeds:
            _check("sigmas", sigma, "seeds", seed)
    chosen = list(choose_layers(attention_layers(model), layers))
    clean = _number(metric(model))
    values = [
        [_number(metric(noisy_copy(model, sigma, layers=layers, seed=seed))) for seed in seeds]
        for sigma in sigmas
    ]
    return Robustness([float(sigma) for sigma in sigmas], values, clean, chosen)


def _check(sigma_name: str, sigma: float, seed_name: str, seed: int) -> None:
    check_number(sigma_name, sigma)
    if sigma < 0:
        raise ValueError(f"{sigma_name} must not be negative, got {sigma!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{seed_name} must be an int, got {seed!r} of type {type(seed).__name__}")


def _number(value: Any) -> float:
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"metric must return a number, got {type(value).__name__}") from None
