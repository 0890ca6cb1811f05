"""What the figures show, in sentences: whether the paper's observations hold for what was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from cbsa_torch.interpret.certificate import Certificate
from cbsa_torch.interpret.pages.measures import Measures
from cbsa_torch.interpret.rates import LayerRates, ReducedRates

STRONG, WEAK = 0.5, 0.2
"""From these rank correlations on, two things are said to move together, or only weakly."""

HARDLY = 0.01
"""A change by less than this share of the rate is called hardly any."""


def sentences(measures: Measures) -> dict[str, str]:
    """Everything that can be said of a model, by the section that it stands in."""
    found = {"later_half": later_half_sentence(measures.rates)}
    if measures.reduced is not None:
        found["together"] = together_sentence(measures.reduced)
        found["gap"] = gap_sentence(measures.reduced)
        found["heads"] = heads_sentence(measures.reduced)
    if measures.certificate is not None:
        found["certificate"] = certificate_sentence(measures.certificate, measures.rates.layers)
        found["certificate_cases"] = cases_sentence(measures.certificate)
    return found


def certificate_sentence(certificate: Certificate, layers: Sequence[str]) -> str:
    """What the theorem says of this model, whose attention layers are ``layers``; it is not measured."""
    sound = [layer.name for layer in certificate.certified if layer.broken is None]
    broken = {layers.index(layer.name) + 1: layer.broken for layer in certificate.certified if layer.broken}
    void = [f"Layer {number} has no certificate: {reason}." for number, reason in broken.items()]
    if not sound:
        return " ".join(void)
    which = "every attention layer"
    if len(sound) < len(layers):
        which = f"attention layer {', '.join(str(layers.index(name) + 1) for name in sound)}"
    claim = (
        f"In every head of {which} and for any input, the step cannot raise the coding rate of the "
        "representatives, the weights that make them held: it falls by at least "
        "ακ(1 \N{MINUS SIGN} ½κ‖G‖₂) tr(CᵀGC) ≥ 0, up to rounding."
    )
    return " ".join([claim, *void])


def cases_sentence(certificate: Certificate) -> str:
    """In how many cases it was measured to hold, and what the steps use of their limit."""
    holding, compressed, void = certificate.holding, certificate.compressed, certificate.void
    cases = certificate.cases - void
    share = certificate.share
    used = (
        f"the median step is {100 * share:.0f} % of the longest certified one" if cases else "there is no step"
    )
    if certificate.beyond_rounding < cases:
        used += f"; only in {certificate.beyond_rounding:,} is more guaranteed than rounding may take away"
    left_out = f" {void:,} cases more are of layers without a certificate." if void else ""
    return (
        f"Measured on what the layers put out, it holds in {holding:,} of {cases:,} cases, one for each layer, "
        f"head and image; {used}. The rate of all tokens, of which nothing is guaranteed, fell in "
        f"{compressed:,} of {'all ' * bool(void)}{certificate.cases:,}.{left_out}"
    )


def later_change(values: Sequence[float]) -> float:
    """By which share values of layers change from the middle layer to the last; NaN where that is undefined."""
    before, after = values[(len(values) - 1) // 2], values[-1]
    return after / before - 1 if before and len(values) > 1 else math.nan


def later_half_sentence(rates: LayerRates) -> str:
    """Whether the later half of the layers compresses (the paper's first observation, Fig. 5)."""
    count, change = len(rates.layers), later_change(rates.rate)
    if count < 2:
        return "The model has one layer: whether later layers compress cannot be said."
    first = (count + 1) // 2  # counted from 1
    later = rates.rate[first - 1 :]
    undefined = [layer for layer, rate in enumerate(later, first) if not math.isfinite(rate)]
    if undefined or not math.isfinite(change):
        reason = (
            f"the rate of layer {undefined[0]} is not a finite number"
            if undefined
            else f"the rate of layer {first} is zero, and a change has no share of it"
        )
        return f"Whether the later half of the layers compresses cannot be said: {reason}."
    if abs(change) < HARDLY:
        verdict = "Over the later half of the layers the rate hardly changes here, unlike in the paper"
    elif all(after < before for before, after in itertools.pairwise(later)):
        verdict = "The later half of the layers compresses, layer by layer, as in the paper"
    elif later[-1] < later[0]:
        verdict = "The later half of the layers compresses, though not in every layer"
    else:
        verdict = "The later half of the layers does not compress here, unlike in the paper"
    return (
        f"{verdict}: from layer {first} to layer {count} the term changes by "
        f"{100 * change:+.1f} % (normalised: {_percent(later_change(rates.normalized))})."
    )


def together_sentence(reduced: ReducedRates) -> str:
    """Whether both reductions move together (the paper's second observation), in every reading of Fig. 6."""
    layers = len(reduced.layers)
    heads = f"{sum(map(len, reduced.tokens))} heads of {layers} layer{'s' if layers > 1 else ''}"
    correlation = reduced.correlation
    if math.isnan(correlation):
        verdict = "Whether the two move together cannot be said"
    elif correlation >= STRONG:
        verdict = "The two move together, as the paper observes"
    elif correlation >= WEAK:
        verdict = "The two move together only weakly here"
    elif correlation > -WEAK:
        verdict = "The two do not move together here"
    else:
        verdict = "The two move against each other here"
    return (
        f"{verdict}: Spearman's rank correlation is {_signed(correlation)} over {heads} after a step of Eq. 6 "
        f"at κ = 1, W \N{MINUS SIGN} A C. In other readings of the tokens after the layer it is "
        f"{_signed(reduced.correlation_learned)} at the learned κ, W + κ A C; "
        f"{_signed(reduced.correlation_output)} for CBSA's output in place of the tokens, A C; "
        f"{_signed(reduced.correlation_added)} for a step against Eq. 6, W + A C. "
        "The paper does not say which its Fig. 6 shows: the verdict is of Eq. 6."
    )


def heads_sentence(reduced: ReducedRates) -> str:
    """How many heads compress their tokens as the layer is trained."""
    effects = [effect for row in reduced.tokens_learned for effect in row]
    steps = [step for row in reduced.step_tokens for step in row]
    compress, positive = sum(effect > 0 for effect in effects), sum(step > 0 for step in steps)
    undefined = sum(math.isnan(effect) for effect in effects)
    return (
        f"At its learned step, {compress} of {len(effects)} heads lower the coding rate of the tokens in their "
        f"subspace (they compress) and {sum(effect < 0 for effect in effects)} raise it (they decompress); "
        + (f"of {undefined} it cannot be said, for the rate is not a number; " if undefined else "")
        + f"κ is positive in {positive}."
    )


def gap_sentence(reduced: ReducedRates) -> str:
    """The tau of Eq. 4 that these images need, and the gap on average."""
    largest = [gap for row in reduced.gap_max for gap in row]
    means = [gap for row in reduced.gap for gap in row]
    if not all(math.isfinite(gap) for gap in (*largest, *means)):
        return "The τ that Eq. 4 needs cannot be said: some head's gap is not a finite number."
    return (
        f"The constraint of Eq. 4 holds here from τ = {max(largest):.1f} nats on, the largest gap of any "
        f"image, layer and head; the mean gap is {sum(means) / len(means):.1f} nats."
    )


def _signed(correlation: float) -> str:
    return "undefined" if math.isnan(correlation) else f"{correlation:+.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %" if math.isfinite(share) else "cannot be said"
