"""What the package knows of ``torch.compile``, without importing it: that takes a second."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

COMPILED = "_orig_mod"
"""Where ``torch.compile`` keeps the module that it wraps."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def called_while_tracing(function: _Function) -> _Function:
    """Have the compiler call a function while it traces, and take what it returns for a constant.

    This is all that ``torch.compiler.assume_constant_result`` does.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_compiled(function: _Function) -> _Function:
    """Have the compiler leave a function alone.

    As ``torch.compiler.disable``, which loads the compiler as soon as it decorates something.
    """

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return called  # type: ignore[return-value]
