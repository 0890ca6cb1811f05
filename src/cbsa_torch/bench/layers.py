"""One attention layer of every mechanism: time and memory against the number of tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers.attention import Attention
from torch import nn

from cbsa_torch import CBSA, MSSA, TSSA, AgentAttention
from cbsa_torch.bench import measure
from cbsa_torch.bench.baselines import LowerBound, NaiveCBSA

Build = Callable[..., nn.Module]

LOWER_BOUND, NAIVE = "lower_bound", "naive"


def _ours(cls: type[nn.Module], **options: Any) -> Build:
    def build(dim: int, num_heads: int) -> nn.Module:
        return cls(dim, num_heads, num_prefix_tokens=1, **options)

    return build


CANDIDATES: dict[str, Build] = {
    LOWER_BOUND: LowerBound,
    NAIVE: NaiveCBSA,
    "cbsa auto": _ours(CBSA),
    "cbsa eager": _ours(CBSA, impl="eager"),
    "cbsa tiled": _ours(CBSA, impl="tiled"),
    "cbsa tiled, recompute": _ours(CBSA, impl="tiled", recompute=True),
    "cbsa triton": _ours(CBSA, impl="triton"),
    "cbsa certified": _ours(CBSA, step="certified"),
    "tssa": _ours(TSSA),
    "agent": _ours(AgentAttention),
    "mssa": _ours(MSSA),
    "mhsa": Attention,
}
"""What is measured, by name; mhsa is timm's, on PyTorch's fused attention."""
QUADRATIC = ("mssa", "mhsa")


class Row(NamedTuple):
    """One candidate at one size in one pass.

    Examples:
        >>> from cbsa_torch.bench.layers import Size, compare
        >>> row = compare([], forward_sizes=[Size(1, 4)], dim=32, num_heads=2, repetitions=1, only=[])[0]
        >>> row.tokens, row.over_lower_bound
        (17, 1.0)
    """

    name: str
    """Of the candidate."""
    batch: int
    """Items."""
    tokens: int
    training: bool
    """Whether a training step was measured, or inference."""
    milliseconds: float
    """Median."""
    repetitions: int
    over_lower_bound: float
    """Its time over that of the lower bound at this size."""
    peak: float | None
    """Memory at the worst moment, in units of the input (B N d elements); None where one call exceeds the
    budget."""
    saved: float | None
    """What training keeps for the backward pass, the input included, in the same unit."""


class Size(NamedTuple):
    """A batch of square grids with a class token.

    Examples:
        >>> from cbsa_torch.bench.layers import Size
        >>> Size(batch=8, side=14).tokens
        197
    """

    batch: int
    side: int

    @property
    def tokens(self) -> int:
        """Class token included."""
        return 1 + self.side**2


def compare(
    sizes: Sequence[Size],
    *,
    forward_sizes: Sequence[Size] = (),
    dim: int = 384,
    num_heads: int = 6,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    repetitions: int = 9,
    budget: float = 10.0,
    quadratic_limit: int = 20_000,
    only: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Measure inference and a training step at every size.

    Args:
        sizes: batches of grids.
        forward_sizes: further sizes, for inference only.
        dim: channels.
        num_heads: heads.
        device: "cpu" or "cuda".
        dtype: of parameters and tokens.
        repetitions: calls that count, at most.
        budget: seconds for one candidate in one pass.
        quadratic_limit: most tokens for a training step of those that compare all tokens with all; four times
            as many for inference.
        only: names of candidates beside the lower bound. Default: all that run on the device.
        progress: is told what comes next.

    Examples:
        >>> from cbsa_torch.bench.layers import Size, compare
        >>> rows = compare([Size(batch=1, side=4)], dim=32, num_heads=2, repetitions=1, only=["CBSA"])
        >>> [(row.name, row.training) for row in rows]
        [('lower_bound', False), ('lower_bound', True)]
    """
    runs = [n for n in CANDIDATES if n != "cbsa triton" or device.startswith("cuda")]
    names = [n for n in runs if n == LOWER_BOUND or only is None or n in only]
    rows: list[Row] = []
    for training, size in [
        *((training, size) for size in sizes for training in (False, True)),
        *((False, size) for size in forward_sizes),
    ]:
        progress(f"{size.batch} x {size.tokens:,} tokens, {'training step' if training else 'inference'}")
        most = quadratic_limit if training else 4 * quadratic_limit
        chosen = [n for n in names if n not in QUADRATIC or size.tokens <= most]
        chosen = [n for n in chosen if training or "recompute" not in n]
        factory_kwargs: Any = {"device": device, "dtype": dtype}
        layers = {name: CANDIDATES[name](dim, num_heads).to(**factory_kwargs) for name in chosen}
        x = torch.randn(size.batch, size.tokens, dim, requires_grad=training, **factory_kwargs)
        gradient = torch.randn_like(x) if training else x
        functions: dict[str, Callable[[], Any]] = {
            name: functools.partial(measure.step, layer, x, gradient)
            if training
            else functools.partial(measure.forward, layer, x)
            for name, layer in layers.items()
        }
        times = measure.interleaved(functions, device, repetitions=repetitions, budget=budget)
        medians = measure.medians(times)
        unit = x.nbytes
        for name, layer in layers.items():
            layer.zero_grad(set_to_none=True)
            x.grad = None
            slow = medians[name] > budget
            peak = None if slow else measure.memory(functions[name], device).peak / unit
            saved = None
            if training and not slow:
                layer.zero_grad(set_to_none=True)
                kept = measure.memory(functools.partial(layer, x), device).left
                saved = kept / unit  # the output is not kept, but the input, of the same size, is
            milliseconds, over = 1e3 * medians[name], medians[name] / medians[LOWER_BOUND]
            at = (name, size.batch, size.tokens, training)
            rows.append(Row(*at, milliseconds, len(times[name]), over, peak, saved))
    return rows
