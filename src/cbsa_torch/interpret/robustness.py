"""How a model bears noise on the parameters of its attention layers (the paper's Fig. 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cbsa_torch._core.checks import check_number
from cbsa_torch._core.precision import compute_dtype
from cbsa_torch.interpret._interrupts import interrupts_wait
from cbsa_torch.interpret.capture import attention_layers, choose_layers

SIGMAS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Standard deviations from 1e-3 to 1, as in Fig. 8."""


class Robustness(NamedTuple):
    """A metric under noise."""

    sigmas: list[float]
    values: list[list[float]]
    """``[sigma][seed]``."""
    clean: float
    """Without noise."""
    layers: list[str]
    """Those that got noise."""


@contextmanager
def parameter_noise(
    model: nn.Module, sigma: float, *, layers: Sequence[str | int] | None = None, seed: int = 0
) -> Iterator[None]:
    """Add Gaussian noise to every parameter of attention layers inside the context, and take it back after.

    Each parameter p becomes p + sigma * n with n standard normal, drawn on the CPU by a generator of its own:
    the global one is left alone, one seed gives the same n for every ``sigma`` and device. A parameter that
    several layers share gets noise once. Of an orthogonal layer the parameter behind the basis is changed, so
    that the basis stays orthonormal.

    Parameters are changed in place and restored to the same bits on leaving, also by an exception or Ctrl-C
    (which waits while they are restored); what the block itself writes into them is lost. Buffers are left
    as they are.

    Args:
        model: a model with mixers of this library or timm's ``Attention``.
        sigma: standard deviation, at least 0 (which changes nothing).
        layers: names or indices of the attention layers to disturb. Default: all.
        seed: of the noise.

    Raises:
        ValueError: ``sigma`` negative or not finite, no such layer. TypeError: ``sigma`` not a number,
            ``seed`` not an int. IndexError: no layer of that index.
    """
    _check_sigma("sigma", sigma)
    _check_seed("seed", seed)
    parameters = _parameters(choose_layers(attention_layers(model), layers).values())
    # All are saved before any changes: two parameters may lie in the same memory.
    saved = [(parameter, parameter.detach().clone()) for parameter in parameters]
    try:
        if sigma > 0:
            _disturb(parameters, sigma, seed)
        yield
    finally:
        try:
            _restore(saved)
        except KeyboardInterrupt:  # Ctrl-C just before it could be told to wait
            _restore(saved)
            raise


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
        model: a model with attention layers; it is handed to ``metric`` as it is (call ``.eval()`` first).
        metric: ``metric(model)`` gives a number, e.g. the accuracy on a validation set.
        sigmas, seeds, layers: of :func:`parameter_noise`.

    Raises:
        ValueError: no sigmas or seeds, one that :func:`parameter_noise` refuses, no such layer. TypeError:
            ``metric`` cannot be called or does not return a number. IndexError: no layer of that index.
    """
    if not callable(metric):
        raise TypeError(f"metric must be callable, metric(model) -> float, got {type(metric).__name__}")
    sigmas, seeds = list(sigmas), list(seeds)
    # A bad one should not turn up after hours.
    if not sigmas or not seeds:
        raise ValueError(f"{'seeds' if sigmas else 'sigmas'} must hold at least one, got none")
    for sigma in sigmas:
        _check_sigma("sigmas", sigma)
    for seed in seeds:
        _check_seed("seeds", seed)
    chosen = list(choose_layers(attention_layers(model), layers))

    def measured() -> float:
        value: Any = metric(model)
        try:
            return float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"metric must return a number, got {type(value).__name__}") from None

    clean = measured()
    values: list[list[float]] = []
    for sigma in sigmas:
        values.append([])
        for seed in seeds:
            with parameter_noise(model, sigma, layers=chosen, seed=seed):
                values[-1].append(measured())
    return Robustness([float(sigma) for sigma in sigmas], values, clean, chosen)


def _check_sigma(name: str, sigma: float) -> None:
    check_number(name, sigma)
    if sigma < 0:
        raise ValueError(f"{name} must not be negative, got {sigma!r}")


def _check_seed(name: str, seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name} must be an int, got {seed!r} of type {type(seed).__name__}")


def _parameters(layers: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The floating-point parameters of ``layers``, each once."""
    unique = {id(p): p for layer in layers for p in layer.parameters() if p.is_floating_point()}
    return list(unique.values())


@torch.no_grad()
def _disturb(parameters: list[nn.Parameter], sigma: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        wide = compute_dtype(parameter.dtype)  # half precision would round the noise before adding it
        parameter.copy_(parameter.to(wide) + sigma * noise.to(parameter.device, wide))


@torch.no_grad()
def _restore(saved: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Write all values back, whatever is raised meanwhile, then raise the first of it."""
    raised: list[BaseException] = []
    with interrupts_wait():
        for parameter, values in saved:
            while True:
                try:
                    parameter.copy_(values)
                    break
                except KeyboardInterrupt as error:  # not by Ctrl-C, which waits: raised by other means
                    raised.append(error)
                except Exception as error:  # the others can still be restored
                    raised.append(error)
                    break
    if raised:
        raise raised[0]
