"""The global random generators of Python, NumPy and torch."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def keep_random_states() -> Iterator[None]:
    """Put the states of Python's, NumPy's and torch's generator (of the CPU) back at the end."""
    numpy: Any = sys.modules.get("numpy")  # torch works without it
    states = random.getstate(), numpy and numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
