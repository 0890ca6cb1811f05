"""Names of parameters without those of the modules that training wraps around a model or its parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from cbsa_torch._core.compiler import COMPILED

_Value = TypeVar("_Value")

WRAPPERS = (COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Where ``torch.compile``, FSDP and checkpointing of activations keep what they wrap; anywhere in a name."""
_OUTERMOST = r"^(module\.)+"
"""DataParallel, DDP and averages of weights (torch's ``AveragedModel``, timm's ``ModelEmaV3``). Only in front:
a part of a model may be called so."""


def bare_name(name: str) -> str:
    """As the model itself has it: ``head.weight`` of ``module._orig_mod.head.weight``."""
    return re.sub(_OUTERMOST, "", _without_inner(name))


def _without_inner(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def bare_state(state: Mapping[str, _Value]) -> dict[str, _Value]:
    """A state dict with the names of the bare model, without the count that ``AveragedModel`` keeps beside it.

    Raises:
        ValueError: two names become one.
    """
    count = "n_averaged"
    inner = [_without_inner(name) for name in state]
    averaged = count in inner and all(name.startswith("module.") for name in inner if name != count)
    bare: dict[str, _Value] = {}
    for name, value in state.items():
        if averaged and _without_inner(name) == count:
            continue
        if bare_name(name) in bare:
            raise ValueError(
                f"two entries are called {bare_name(name)}, but for names of wrappers such as module.; keep one"
            )
        bare[bare_name(name)] = value
    return bare
