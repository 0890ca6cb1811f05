"""What the package knows of ``torch.compile``, without importing it: that takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

COMPILED = "_orig_mod"
"""Where ``torch.compile`` keeps the module that it wraps."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def called_while_tracing(function: _Function) -> _Function:
    """Have the compiler call a function while it traces, and take what it returns for a constant.

    This is all that ``torch.compiler.assume_constant_result`` does.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
