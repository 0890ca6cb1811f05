"""Measurements as JSON, which knows neither NaN nor infinity."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def finite(value: Any) -> Any:
    """Plain values with None for NaN and infinity, however deep inside.

    Named tuples and mappings become dictionaries, lists and tuples lists, tensors and arrays nested lists;
    anything else stays as it is.
    """
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dump(numbers: Any) -> str:
    """``numbers`` as JSON: what :func:`finite` makes of them.

    Raises:
        TypeError: something in it that JSON has no form for.
    """
    return json.dumps(finite(numbers), allow_nan=False, indent=2)
