"""What the figures show, in sentences that are true as measured: the paper's observations may not hold."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from cbsa_torch.interpret.rates import LayerRates, ReducedRates

STRONG, WEAK = 0.5, 0.2
"""Rank correlations from which two things move together, or weakly so."""

HARDLY = 0.01
"""Share of the rate below which it is said to hardly change."""


class LaterHalf(NamedTuple):
    """How the compression term goes in the later half of the layers (Fig. 5)."""

    first: int
    last: int
    """Layers, from 1: the middle one and the last."""
    change: float
    """Share by which the term changes from the one to the other; negative = compressed."""
    change_normalized: float
    compresses: bool
    steadily: bool
    """Every layer's term is below that of the layer before."""


def later_half(rates: LayerRates) -> LaterHalf | None:
    """Compare the middle layer with the last; None for a model of one layer."""
    count = len(rates.layers)
    if count < 2:
        return None
    middle = (count - 1) // 2
    later = rates.rate[middle:]
    return LaterHalf(
        first=middle + 1,
        last=count,
        change=_change(rates.rate[middle], rates.rate[-1]),
        change_normalized=_change(rates.normalized[middle], rates.normalized[-1]),
        compresses=later[-1] < later[0],
        steadily=all(after < before for before, after in itertools.pairwise(later)),
    )


def later_half_sentence(rates: LayerRates) -> str:
    """Whether the later half of the layers compresses (the paper's first observation)."""
    found = later_half(rates)
    if found is None:
        return "The model has one layer: whether later layers compress cannot be said."
    if abs(found.change) < HARDLY:
        verdict = "Over the later half of the layers the rate hardly changes here, unlike in the paper"
    elif found.steadily:
        verdict = "The later half of the layers compresses, layer by layer, as in the paper"
    elif found.compresses:
        verdict = "The later half of the layers compresses, though not in every layer"
    else:
        verdict = "The later half of the layers does not compress here, unlike in the paper"
    return (
        f"{verdict}: from layer {found.first} to layer {found.last} the term changes by "
        f"{100 * found.change:+.1f} % (normalised: {100 * found.change_normalized:+.1f} %)."
    )


def together_sentence(reduced: ReducedRates) -> str:
    """Whether both reductions move together (the paper's second observation)."""
    count = sum(len(row) for row in reduced.tokens)
    if math.isnan(reduced.correlation):
        return "Whether the two move together cannot be said: their rank correlation is not defined here."
    if reduced.correlation >= STRONG:
        verdict = "The two move together, as the paper observes"
    elif reduced.correlation >= WEAK:
        verdict = "The two move together only weakly here"
    elif reduced.correlation > -WEAK:
        verdict = "The two do not move together here"
    else:
        verdict = "The two move against each other here"
    others = ", ".join(
        f"{value:+.2f} {name}"
        for value, name in (
            (reduced.correlation_learned, "at the learned κ"),
            (reduced.correlation_output, "for CBSA's output in place of the tokens"),
        )
        if not math.isnan(value)
    )
    return (
        f"{verdict}: Spearman's rank correlation is {reduced.correlation:+.2f} over {count} heads of "
        f"{len(reduced.layers)} layer{'s' if len(reduced.layers) > 1 else ''} after a step of Eq. 6 at κ = 1"
        + (f" ({others})." if others else ".")
        + " The paper does not say how its Fig. 6 takes the tokens after the layer: the verdict is of this one."
    )


def heads_sentence(reduced: ReducedRates) -> str:
    """How many heads compress their tokens as the layer is trained."""
    effects = [effect for row in reduced.tokens_learned for effect in row]
    steps = [step for row in reduced.step_tokens for step in row]
    compress, positive = sum(effect > 0 for effect in effects), sum(step > 0 for step in steps)
    return (
        f"At its learned step, {compress} of {len(effects)} heads lower the coding rate of the tokens in their "
        f"subspace (they compress) and {sum(effect < 0 for effect in effects)} raise it (they decompress); "
        f"κ is positive in {positive}."
    )


def _change(before: float, after: float) -> float:
    return after / before - 1 if before else math.nan
