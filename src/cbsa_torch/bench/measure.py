"""Time and memory of functions, on the CPU and on CUDA devices."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


class Memory(NamedTuple):
    """Bytes that were allocated while a function ran.

    Examples:
        >>> from cbsa_torch.bench.measure import memory
        >>> used = memory(lambda: (torch.zeros(1000) + 1).sum(), "cpu")
        >>> used.peak, used.left
        (8012, 4)
    """

    peak: int
    """At the worst moment, beyond what was there before."""
    left: int
    """After it returned, its result included."""


def interleaved(
    functions: Mapping[str, Callable[[], Any]], device: str, *, repetitions: int, budget: float
) -> dict[str, list[float]]:
    """Seconds of every function, called in turn (A B C A B C ...), so that a drifting machine drifts for all.

    The first call of each warms up, unless it took longer than the budget.

    Args:
        functions: what to call, by name.
        device: "cuda" waits for the device.
        repetitions: counted calls of each, fewer where they take long, at least one.
        budget: seconds for the calls of one function.

    Examples:
        >>> from cbsa_torch.bench.measure import interleaved
        >>> times = interleaved({"sum": lambda: sum(range(100))}, "cpu", repetitions=3, budget=1.0)
        >>> len(times["sum"])
        3
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    left = dict.fromkeys(functions, repetitions)
    for name, function in functions.items():
        warm = _seconds(function, device)
        left[name] = max(1, min(repetitions, int(budget / warm)))
        if warm > budget:
            times[name], left[name] = [warm], 0
    while any(left.values()):
        for name, function in functions.items():
            if left[name]:
                times[name].append(_seconds(function, device))
                left[name] -= 1
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each.

    Examples:
        >>> from cbsa_torch.bench.measure import medians
        >>> medians({"ours": [1.0, 5.0, 2.0]})
        {'ours': 2.0}
    """
    return {name: statistics.median(values) for name, values in times.items()}


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third.

    Examples:
        >>> from cbsa_torch.bench.measure import quartiles
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
        (2.0, 3.0, 4.0)
    """
    at = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    first, median, third = torch.tensor(times, dtype=torch.float64).quantile(at).tolist()
    return first, median, third


def memory(function: Callable[[], Any], device: str) -> Memory:
    """What ``function`` allocates on ``device``. Its result is kept while the rest is counted.

    Examples:
        >>> from cbsa_torch.bench.measure import memory
        >>> memory(lambda: torch.zeros(1000), "cpu").left
        4000
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        del result
        return Memory(peak - before, after - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    assert recorded.profiler is not None
    events: Any = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    del result
    now = peak = 0
    for _, size in changes:
        now += size
        peak = max(peak, now)
    return Memory(peak, now)


def forward(module: nn.Module, x: Tensor) -> Tensor:
    """Inference."""
    with torch.no_grad():
        output: Tensor = module(x)
    return output


def step(module: nn.Module, x: Tensor, gradient: Tensor | None = None) -> None:
    """Forward and backward from nothing: gradients of parameters, and of an input that wants one.

    ``gradient`` is that of the output. Default: ones.
    """
    module.zero_grad(set_to_none=True)
    x.grad = None
    output = module(x)
    output.backward(torch.ones_like(output) if gradient is None else gradient)


def _seconds(function: Callable[[], Any], device: str) -> float:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
