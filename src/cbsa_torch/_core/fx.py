"""What ``torch.fx`` records as one call: it follows code with proxies, which have no shapes to look at."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn
from torch.fx import GraphModule, Proxy, Tracer

_Function = TypeVar("_Function", bound=Callable[..., Any])


def fx_leaf(function: _Function) -> _Function:
    """Have FX record a call of a function, or of the module whose ``forward`` this is, and not look inside.

    For what decides by shapes or checks its arguments. It is called with real tensors when the graph runs, and
    raises what it raises. Graphs have no hooks: what these would tell a module, it is given as the keywords
    that its ``fx_arguments(tracer)`` returns, if its caller gives
    no more than it must.
    """
    parameters = inspect.signature(function).parameters.values()
    num_required = sum(parameter.default is parameter.empty for parameter in parameters) - 1  # less self

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = _tracer_of(args, kwargs)
        if tracer is None:
            return function(*args, **kwargs)
        if not isinstance(args[0], nn.Module):
            return tracer.create_proxy("call_function", function, args, kwargs)
        module, *given = args
        if module is tracer.root:
            raise TypeError(
                f"{type(module).__name__} is one node of FX graphs, with none inside: trace the model around it"
            )
        if len(given) <= num_required:
            kwargs = {**getattr(module, "fx_arguments", _no_arguments)(tracer), **kwargs}
        return tracer.create_proxy("call_module", tracer.path_of_module(module), tuple(given), kwargs)

    return cast(_Function, call)


def _no_arguments(_: Tracer) -> dict[str, Any]:
    return {}


def _tracer_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tracer | None:
    """Who traces, if an argument is a proxy."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Proxy):
            return cast(Tracer, value.tracer)
    return None


class ScriptableGraph(GraphModule):
    """The FX graph of a model, for ``torch.jit.script``, which would warn of how the base class is written."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, Tracer().trace(model))
