"""Argument checks with one voice: which argument, what it got, what is allowed, what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import Proxy

from cbsa_torch._core.types import DEFAULT_EPS


def nearest(value: object, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest choice, or an empty string."""
    matches = difflib.get_close_matches(str(value).lower(), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        allowed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}{nearest(value, choices)}")


def check_bool(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")


def check_positive_int(name: str, value: int) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_sides(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Return ``(height, width)`` of one side or both; raise unless they are integers of at least 1."""
    sides = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2:
        raise ValueError(f"{name} must be an int or (height, width), got {value!r}")
    for side in sides:
        check_positive_int(name, side)
    return sides


def check_number(name: str, value: object) -> None:
    """Raise unless ``value`` is an int or a float, and finite."""
    _check_number_type(name, value)
    # A compiler may have made the number symbolic.
    if not torch.compiler.is_compiling() and not math.isfinite(value):  # type: ignore[arg-type]
        raise ValueError(f"{name} must be finite, got {value!r}")


def _check_number_type(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number above zero, and so is its square."""
    _check_number_type(name, value)
    if not 0 < value <= 1e150 or value * value == 0:
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def exact_eps(eps: float | None, contraction: str) -> float:
    """The epsilon of ``contraction="exact"``: ``DEFAULT_EPS`` if None; other contractions have none to give."""
    if eps is None:
        return DEFAULT_EPS
    check_positive("eps", eps)
    if contraction != "exact":
        raise ValueError(f"eps is of contraction='exact'; contraction={contraction!r} has none, got {eps}")
    return eps


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` is a real floating-point tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_kind(tensor)}")
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} must have a floating-point dtype, got {tensor.dtype}; convert it with .float()"
        )


def _kind(value: object) -> str:
    """The class of what should be a tensor; of a proxy also what to do."""
    in_fx = "; torch.fx cannot trace what looks at sizes: use torch.export"
    return f"{type(value).__name__}{in_fx if isinstance(value, Proxy) else ''}"


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | None], axes: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` has shape ``expected`` (``None`` = any size of at least 1).

    Only the first axis, the batch, may be empty, and what is expected to be.

    ``axes`` names the axes for the message, e.g. ``"(B, H, N, P)"``.
    """
    shape = tuple(tensor.shape)
    if len(shape) != len(expected):
        raise ValueError(f"{name} must have shape {axes}, got {shape} with {len(shape)} axes")
    for got, want in zip(shape, expected, strict=True):
        if want is not None and got != want:
            wanted = ", ".join("any" if size is None else str(int(size)) for size in expected)
            raise ValueError(f"{name} must have shape {axes} = ({wanted}), got {shape}")
    if any(got == 0 and want is None for got, want in zip(shape[1:], expected[1:], strict=True)):
        raise ValueError(f"{name} must not be empty, got shape {shape} for {axes}")


def check_rows(
    name: str, tensor: Tensor, expected: Sequence[int | None], axes: str, reference_name: str, reference: Tensor
) -> None:
    """:func:`check_floating`, :func:`check_shape`, and raise unless dtype and device are the reference's."""
    check_floating(name, tensor)
    check_shape(name, tensor, expected, axes)
    if tensor.dtype != reference.dtype:
        raise TypeError(
            f"{name} must have the dtype of {reference_name} ({reference.dtype}), got {tensor.dtype}"
        )
    check_device(name, tensor, reference_name, reference)


def check_device(name: str, tensor: Tensor, reference_name: str, reference: Tensor) -> None:
    """Raise ``ValueError`` unless ``tensor`` is on the device of ``reference``."""
    if tensor.device != reference.device:
        raise ValueError(
            f"{name} must be on the device of {reference_name} ({reference.device}), got {tensor.device}"
        )


def check_per_head(name: str, value: Tensor | float, reference_name: str, reference: Tensor) -> None:
    """Raise unless ``value`` is a finite number or a floating-point ``(H,)`` that fits ``(B, H, N, P)``."""
    if isinstance(value, Tensor):
        check_floating(name, value)
        check_shape(name, value, (reference.shape[1],), "(H,)")
        check_device(name, value, reference_name, reference)
    else:
        check_number(name, value)


def check_mask(
    name: str,
    mask: Tensor,
    shape: Sequence[int | None],
    axes: str,
    meaning: str,
    of: tuple[str, Tensor] | None = None,
) -> None:
    """Raise unless ``mask`` is a boolean tensor of ``shape``; ``meaning`` says what True stands for.

    ``of``: name and tensor of what is masked, whose device it must be on.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool (True = {meaning}), got {mask.dtype}")
    check_shape(name, mask, shape, axes)
    if of is not None:
        check_device(name, mask, *of)
