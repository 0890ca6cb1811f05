"""How claims are judged: what the records say of each, with an interval, and a verdict that follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from benchmarks.claims.runs import RESULTS
from benchmarks.estimates import Estimate, difference, mean_of
from cbsa_torch.ops import counting

LINES = Path("docs/images/lines.json")
MODELS = Path("benchmarks/results/models.json")
TOLERANCE = 1e-12
"""Relative error up to which an equation holds in float64."""

Verdict = Literal["holds", "does not hold", "cannot be told"]
Records = Sequence[dict[str, Any]]


class Finding(NamedTuple):
    """What the records say of a claim."""

    figure: str
    verdict: Verdict


def records(pattern: str) -> list[dict[str, Any]]:
    """The records whose names match, by name."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{pattern}.json"))]


def is_positive(estimate: Estimate) -> Verdict:
    """Whether the interval says that a quantity is above zero, below it, or neither."""
    if estimate.half is None or abs(estimate.value) <= estimate.half:
        return "cannot be told"
    return "holds" if estimate.value > 0 else "does not hold"


Share = Callable[[dict[str, Any]], float]


def compare(first: Records, second: Records, share: Share, unit: str = "points") -> Finding | None:
    """Whether the first have a larger share than the second, by means over seeds."""
    if min(len(first), len(second)) < 2:
        return None
    values = [[100 * share(record) for record in group] for group in (first, second)]
    more = difference(*values)
    means = " against ".join(f"{mean_of(group).text()} %" for group in values)
    return Finding(f"{more.text('+')} {unit} ({means}; {seeds(first, second)})", is_positive(more))


def seeds(*groups: Records) -> str:
    """How many there were of each."""
    numbers = sorted({len(group) for group in groups})
    return f"{' and '.join(map(str, numbers))} seeds"


def scratch(form: str) -> list[dict[str, Any]]:
    """The runs from scratch of a form."""
    return records(f"scratch_{form}_seed?")


def accuracy(first: str, second: str) -> Callable[[], Finding | None]:
    """Test accuracy of two forms from scratch."""
    return lambda: compare(scratch(first), scratch(second), top1)


def top1(record: dict[str, Any]) -> float:
    """Of a classifier."""
    return float(record["test_top1"])


def miou(record: dict[str, Any]) -> float:
    """Of a decoder."""
    return float(record["test"]["miou"])


def decoders(form: str) -> list[dict[str, Any]]:
    """The decoders of a form on the frozen encoder."""
    return records(f"decoders_{form}_seed?")


def masks(first: str, second: str) -> Callable[[], Finding | None]:
    """Mean IoU of two decoders on the frozen encoder."""
    return lambda: compare(decoders(first), decoders(second), miou)


def recovered(first: str, second: str, recovery: str = "plain") -> Callable[[], Finding | None]:
    """Test accuracy of two adapted ViTs after recovery."""

    def judge() -> Finding | None:
        plain = "plain" if second == "original" else recovery  # the original has no teacher
        return compare(
            records(f"adapted_{first}_all_{recovery}_112_seed?"),
            records(f"adapted_{second}_all_{plain}_112_seed?"),
            top1,
        )

    return judge


def decoder_cost(key: str, most: float) -> Callable[[], Finding | None]:
    """What CBSA's decoder costs in parts of Segmenter's, on images of the paper's size."""

    def judge() -> Finding | None:
        found = records("decoders_cost")
        if not found:
            return None
        sides = {one["side"]: one["decoders"] for one in found[0]["sides"]}
        parts = [100 * sides[side]["cbsa"][key] / sides[side]["mhsa"][key] for side in (448, 518, 1022)]
        text = ", ".join(f"{part:.2g} %" for part in parts)
        return Finding(
            f"{text} at 448, 518 and 1,022 pixels (counted)", "holds" if parts[1] <= most else "does not hold"
        )

    return judge


def kept(sigma: float) -> Share:
    """The share of its clean mean IoU that a decoder keeps under noise."""

    def share(record: dict[str, Any]) -> float:
        noisy = record["robustness"]
        place = noisy["sigmas"].index(sigma)
        return fmean(noisy["values"][place]) / float(noisy["clean"])

    return share


def keeps_more(first: str, second: str, sigma: float) -> Callable[[], Finding | None]:
    """Whether one decoder keeps a larger share of its mean IoU under noise than another."""
    return lambda: compare(decoders(first), decoders(second), kept(sigma), "points of what is kept")


def immune(form: str, sigma: float, most: float) -> Callable[[], Finding | None]:
    """Whether a decoder loses at most so many per cent of its mean IoU under noise."""

    def judge() -> Finding | None:
        runs = decoders(form)
        if len(runs) < 2:
            return None
        left = mean_of([100 * kept(sigma)(run) for run in runs])
        spare = Estimate(left.value - (100 - most), left.half)
        return Finding(f"{left.text()} % is kept ({seeds(runs)})", is_positive(spare))

    return judge


def adapted_cost(side: int, key: str, larger: bool) -> Callable[[], Finding | None]:
    """A figure of the adapted ViT in parts of the original's."""

    def judge() -> Finding | None:
        found = records("adapted_cost")
        if not found:
            return None
        rows = {row["name"]: row for row in found[0]["rows"] if row["image_size"] == side}
        ratio = rows["adapted_cbsa"][key] / rows["original"][key]
        right = ratio > 1 if larger else ratio < 1
        return Finding(f"{ratio:.2f} times at {side} pixels", "holds" if right else "does not hold")

    return judge


def similarities() -> Finding:
    """Table 4's counts, by ours of the same sizes: CBSA, TSSA and MSSA of tiny and small models."""
    sizes = {"tiny": 3, "small": 6}
    layers, tokens, width = 12, 197, 64
    published = {"tiny": (0.53, 0.45, 1.4), "small": (1.1, 0.91, 2.8)}
    agree, parts = True, []
    for name, heads in sizes.items():
        counted = (
            counting.cbsa(tokens, width, num_heads=heads, head_dim=width),
            counting.channel_attention(tokens, num_heads=heads, head_dim=width),
            counting.softmax_attention(tokens, num_heads=heads, head_dim=width),
        )
        millions = [layers * one.similarities / 1e6 for one in counted]
        agree &= [float(f"{ours:.2g}") for ours in millions] == list(published[name])
        parts.append(f"{name} {' / '.join(f'{ours:.2f}' for ours in millions)} million")
    return Finding(f"{'; '.join(parts)} (counted)", "holds" if agree else "does not hold")


def crossing() -> Finding:
    """From how many tokens on CBSA takes fewer products than softmax attention, with M = P = 64."""

    def less(tokens: int) -> bool:
        ours = counting.cbsa(tokens, 64, num_heads=6, head_dim=64)
        return ours.flops < counting.softmax_attention(tokens, num_heads=6, head_dim=64).flops

    first = next(tokens for tokens in range(1, 10_000) if less(tokens))
    right = first == 129 and all(less(tokens) for tokens in range(first, 10_000))
    return Finding(f"from N = {first} on (counted)", "holds" if right else "does not hold")


def speed(first: str, second: str, *, training: bool, size: int = 512) -> Callable[[], Finding]:
    """Images/s of one small model over another's, from the benchmark of models."""

    def judge() -> Finding:
        rows = [
            row
            for row in json.loads(MODELS.read_text())["rows"]
            if row["image_size"] == size and row["training"] is training
        ]
        found = {row["name"].removesuffix("_small_patch16_224"): row for row in rows}
        ours, theirs = found[first], found[second]
        low, high = (theirs["quartiles"][place] / ours["quartiles"][1 - place] for place in (0, 1))
        ratio = ours["images_per_second"] / theirs["images_per_second"]
        verdict: Verdict = "holds" if low > 1 else "does not hold" if high < 1 else "cannot be told"
        return Finding(f"{ratio:.2f} times the images/s (quartiles {low:.2f} to {high:.2f})", verdict)

    return judge


def ranks(form: str) -> Callable[[], Finding | None]:
    """Effective rank of A over layers and heads, of pooled or learned first guesses."""

    def judge() -> Finding | None:
        runs = scratch(form)
        if len(runs) < 2:
            return None
        full = 16
        numeric, effective = (
            mean_of([mean_over(run["inside"]["ranks"][key]) for run in runs]) for key in ("rank", "effective")
        )
        text = f"rank {numeric.text()} of {full}, effective {effective.text()} ({seeds(runs)})"
        if form == "learned":
            half = Estimate(full / 2 - effective.value, effective.half)
            return Finding(f"{text}; below half: {is_positive(half)}", is_positive(half))
        return Finding(text, "holds" if numeric.value > full - 0.5 else "does not hold")

    return judge


def mean_over(rows: Sequence[Sequence[float]]) -> float:
    """Over layers and heads."""
    return fmean(value for row in rows for value in row)


def later_half(form: str) -> Callable[[], Finding | None]:
    """By how much the rate of all tokens falls from the middle layer to the last."""

    def judge() -> Finding | None:
        runs = scratch(form)
        if len(runs) < 2:
            return None
        falls = []
        for run in runs:
            rate = run["inside"]["rate"]
            middle = rate[len(rate) // 2 - 1]
            falls.append(100 * (middle - rate[-1]) / middle)
        fall = mean_of(falls)
        figure = f"{fall.text()} % lower at the last layer than in the middle ({seeds(runs)})"
        return Finding(figure, is_positive(fall))

    return judge


def together(reading: str) -> Callable[[], Finding | None]:
    """The rank correlation of Fig. 6 in one of its readings."""

    def judge() -> Finding | None:
        runs = scratch("cbt")
        if len(runs) < 2:
            return None
        correlation = mean_of([run["inside"]["figure_6"][reading] for run in runs])
        return Finding(f"rank correlation {correlation.text('+')} ({seeds(runs)})", is_positive(correlation))

    return judge


def compresses(form: str, kind: str) -> Callable[[], Finding | None]:
    """In which share of all cases the rate of ``kind`` is lower after the step that the layer takes."""

    def judge() -> Finding | None:
        runs = scratch(form)
        if len(runs) < 2:
            return None
        shares = []
        for run in runs:
            layers = [layer[kind] for layer in run["inside"]["step"]["layers"]]
            shares.append(100 * sum(one["fell"] for one in layers) / sum(one["cases"] for one in layers))
        share = mean_of(shares)
        most = Estimate(share.value - 95, share.half)
        return Finding(f"in {share.text()} % of all cases ({seeds(runs)})", is_positive(most))

    return judge


def certified() -> Finding | None:
    """Whether each step kept its guarantee."""
    runs = scratch("certified")
    if not runs:
        return None
    found = [run["inside"]["certificates"]["float64"] for run in runs]
    holding, cases = (sum(one[key] for one in found) for key in ("holding", "cases"))
    share = fmean(one["share"] for one in found)
    figure = f"{holding:,} of {cases:,} cases, median step {100 * share:.0f} % of its limit ({seeds(runs)})"
    return Finding(figure, "holds" if holding == cases else "does not hold")


def gap() -> Finding | None:
    """|R(Q) - R(Z)| in parts of R(Z), of which Eq. 4 says that it is at most some tau."""
    runs = scratch("cbt")
    if len(runs) < 2:
        return None
    shares = []
    for run in runs:
        whole = sum(sum(layer) for layer in run["inside"]["gap"])
        shares.append(100 * whole / sum(run["inside"]["rate"]))
    return Finding(f"{mean_of(shares).text()} % of R(Z) ({seeds(runs)}); no tau is given", "cannot be told")


def zero_shot(first: str, second: str) -> Callable[[], Finding | None]:
    """Foreground IoU of the best head and layer on the outlines of emoji."""

    def judge() -> Finding | None:
        groups = [records(f"inside_emoji_{form}_seed?") for form in (first, second)]
        return compare(groups[0], groups[1], best_map, "points of IoU")

    return judge


def best_map(record: dict[str, Any]) -> float:
    """Foreground IoU of the best head of the best layer."""
    return float(max(record["zero_shot"]["best"]["foreground"]))


def identity(error: Callable[[], float]) -> Callable[[], Finding]:
    """An equation, checked in float64."""

    def judge() -> Finding:
        found = error()
        return Finding(f"error below {TOLERANCE:g}", "holds" if found < TOLERANCE else "does not hold")

    return judge


def lines() -> Finding:
    """Points pressed onto their lines (Fig. 4)."""
    measures = json.loads(LINES.read_text())["measures"]
    first, last = measures["0"], measures[max(measures, key=int)]
    figure = (
        f"{first['angle_to_own_line']:.1f} to {last['angle_to_own_line']:.1f} degrees from the own line, "
        f"{last['angle_to_nearest_other_line']:.0f} from the nearest other (one draw)"
    )
    return Finding(figure, "holds" if last["separation"] > first["separation"] else "does not hold")
