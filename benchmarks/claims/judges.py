"""How claims are judged: what the records say of each, with an interval, and a verdict that follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from benchmarks.claims.runs import RESULTS
from benchmarks.claims.street_maps import PLACES
from benchmarks.estimates import Estimate, mean_of, paired_difference
from cbsa_torch.ops import counting

DIGITS = Path("benchmarks/results/digits_family.json")
MODELS = Path("benchmarks/results/models.json")
FULL_RANK = 16
"""Representatives of the models from scratch."""
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
    """Whether the first have a larger share than the second, by the seeds that both have."""
    by_seed = [{record["seed"]: 100 * share(record) for record in group} for group in (first, second)]
    both = sorted(by_seed[0].keys() & by_seed[1].keys())
    if not both:
        return None
    values = [[group[seed] for seed in both] for group in by_seed]
    more = paired_difference(*values)
    means = " against ".join(f"{mean_of(group).text()} %" for group in values)
    return Finding(f"{more.text('+')} {unit} ({means}; {seeds(both)})", is_positive(more))


def above(values: Sequence[float], limit: float = 0.0) -> Verdict:
    """Whether the interval of the mean is above a limit, below it, or neither."""
    found = mean_of(values)
    return is_positive(Estimate(found.value - limit, found.half))


def seeds(runs: Sequence[Any]) -> str:
    """How many there were."""
    return "one seed" if len(runs) == 1 else f"{len(runs)} seeds"


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


def adapted(first: str, second: str) -> Callable[[], Finding | None]:
    """Test accuracy of two ViTs after recovery, each FORM_LAYERS_RECOVERY_SIDE."""
    return lambda: compare(records(f"adapted_{first}_seed?"), records(f"adapted_{second}_seed?"), top1)


def finetuned(first: str, second: str) -> Callable[[], Finding | None]:
    """Mean IoU of two decoders whose encoder was trained along."""
    return lambda: compare(
        records(f"decoders_{first}_finetuned"), records(f"decoders_{second}_finetuned"), miou
    )


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
        if not runs:
            return None
        left = [100 * kept(sigma)(run) for run in runs]
        return Finding(f"{mean_of(left).text()} % is kept ({seeds(runs)})", above(left, 100 - most))

    return judge


def adapted_flops(side: int) -> Callable[[], Finding | None]:
    """FLOPs of the adapted ViT in parts of the original's."""

    def judge() -> Finding | None:
        found = cost_of_adapted("flops")
        if not found:
            return None
        text = ", ".join(f"{found[one]:.2f}" for one in sorted(found))
        sides = ", ".join(map(str, sorted(found)))
        verdict: Verdict = "holds" if found[side] < 1 else "does not hold"
        return Finding(f"{text} times at {sides} pixels (counted)", verdict)

    return judge


def adapted_speed(side: int) -> Callable[[], Finding | None]:
    """Images/s of the adapted ViT over the original's, with the memory beside it."""

    def judge() -> Finding | None:
        found = records("adapted_cost")
        if not found:
            return None
        rows = {row["name"]: row for row in found[0]["rows"] if row["image_size"] == side}
        ours, theirs = rows["adapted_cbsa"], rows["original"]
        figure, verdict = faster(ours, theirs)
        memory = ours["peak_mib"] / theirs["peak_mib"]
        return Finding(f"{figure}, {memory:.2f} times the memory", verdict)

    return judge


def cost_of_adapted(key: str) -> dict[int, float]:
    """A counted figure of the adapted ViT in parts of the original's, by the side of the image."""
    rows = [row for record in records("adapted_cost") for row in record["rows"]]
    at = {(row["name"], row["image_size"]): row[key] for row in rows}
    return {side: at["adapted_cbsa", side] / at["original", side] for name, side in at if name == "original"}


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
        return faster(found[first], found[second])

    return judge


def faster(ours: dict[str, Any], theirs: dict[str, Any]) -> Finding:
    """Images/s of one over another's, and quartile over opposite quartile, with rows of a benchmark."""
    low, high = (theirs["quartiles"][place] / ours["quartiles"][1 - place] for place in (0, 1))
    ratio = ours["images_per_second"] / theirs["images_per_second"]
    verdict: Verdict = "holds" if low > 1 else "does not hold" if high < 1 else "cannot be told"
    return Finding(f"{ratio:.2f} times the images/s (quartiles {low:.2f} to {high:.2f})", verdict)


def small_speed(first: str, second: str) -> Callable[[], Finding | None]:
    """Images/s of inference of one model from scratch over another's."""

    def judge() -> Finding | None:
        found = records("scratch_speed")
        if not found:
            return None
        rows = {row["form"]: row for row in found[0]["rows"] if not row["training"]}
        return faster(rows[first], rows[second])

    return judge


def ranks(form: str) -> Callable[[], Finding | None]:
    """Rank of A over layers and heads, of pooled or learned initial guesses."""

    def judge() -> Finding | None:
        runs = scratch(form)
        if not runs:
            return None
        numeric, effective = (
            [mean_over(run["inside"]["ranks"][key]) for run in runs] for key in ("rank", "effective")
        )
        text = f"rank {mean_of(numeric).text()} of {FULL_RANK}, effective {mean_of(effective).text()}"
        if form == "learned":
            verdict = above([-rank for rank in effective], -FULL_RANK / 2)
            return Finding(f"{text} ({seeds(runs)}); low: effective rank below half", verdict)
        return Finding(f"{text} ({seeds(runs)})", above(numeric, FULL_RANK - 0.5))

    return judge


def mean_over(rows: Sequence[Sequence[float]]) -> float:
    """Over layers and heads."""
    return fmean(value for row in rows for value in row)


def later_half(form: str) -> Callable[[], Finding | None]:
    """By how much the rate of all tokens falls from the middle layer to the last."""

    def judge() -> Finding | None:
        runs = scratch(form)
        if not runs:
            return None
        falls = []
        for run in runs:
            rate = run["inside"]["rate"]
            middle = rate[len(rate) // 2 - 1]
            falls.append(100 * (middle - rate[-1]) / middle)
        figure = f"{mean_of(falls).text()} % lower at the last layer than in the middle ({seeds(runs)})"
        return Finding(figure, above(falls))

    return judge


def together(reading: str) -> Callable[[], Finding | None]:
    """The rank correlation of Fig. 6 in one of its readings."""

    def judge() -> Finding | None:
        runs = scratch("cbt")
        if not runs:
            return None
        correlation = mean_of([run["inside"]["figure_6"][reading] for run in runs])
        return Finding(f"rank correlation {correlation.text('+')} ({seeds(runs)})", is_positive(correlation))

    return judge


def compresses(form: str, kind: str) -> Callable[[], Finding | None]:
    """In which share of all cases the rate of ``kind`` is lower after the step that the layer takes."""

    def judge() -> Finding | None:
        runs = scratch(form)
        if not runs:
            return None
        shares = []
        for run in runs:
            layers = [layer[kind] for layer in run["inside"]["step"]["layers"]]
            shares.append(100 * sum(one["fell"] for one in layers) / sum(one["cases"] for one in layers))
        return Finding(f"in {mean_of(shares).text()} % of all cases ({seeds(runs)})", above(shares, 95))

    return judge


def certified(pattern: str) -> Callable[[], Finding | None]:
    """Whether each step of these runs kept its guarantee."""

    def judge() -> Finding | None:
        runs = records(pattern)
        if not runs:
            return None
        found = [run["inside"]["certificates"]["float64"] for run in runs]
        holding, cases = (sum(one[key] for one in found) for key in ("holding", "cases"))
        share = 100 * fmean(one["share"] for one in found)
        figure = f"{holding:,} of {cases:,} cases, median step {share:.0f} % of its limit ({seeds(runs)})"
        return Finding(figure, "holds" if holding == cases else "does not hold")

    return judge


def gap() -> Finding | None:
    """|R(Q) - R(Z)| in parts of R(Z), of which Eq. 4 says that it is at most some tau."""
    runs = scratch("cbt")
    if not runs:
        return None
    shares = []
    for run in runs:
        whole = sum(sum(layer) for layer in run["inside"]["gap"])
        shares.append(100 * whole / sum(run["inside"]["rate"]))
    return Finding(f"{mean_of(shares).text()} % of R(Z) ({seeds(runs)}); no tau is given", "cannot be told")


def zero_shot(first: str, second: str) -> Callable[[], Finding | None]:
    """IoU with the outlines of emoji of the head that is best on validation; beside it that of a disc."""

    def judge() -> Finding | None:
        groups = [records(f"inside_emoji_{form}_seed?") for form in (first, second)]
        found = compare(groups[0], groups[1], outline_iou, "points of IoU")
        return found and beside(found, f"a disc {100 * groups[0][0]['disc']:.1f} %")

    return judge


def outline_iou(record: dict[str, Any]) -> float:
    """With the drawing, of the chosen head."""
    return float(record["zero_shot"]["chosen"]["foreground"]["iou"])


def beside(found: Finding, text: str) -> Finding:
    """The same with a further figure, which does not matter for the verdict."""
    return Finding(f"{found.figure}; {text}", found.verdict)


def street_maps(first: str, second: str, key: str = "mean_iou") -> Callable[[], Finding | None]:
    """IoU of the adapted ViTs' maps with CamVid's classes, the mean over classes; beside it that of places.

    Args:
        first, second: the ViTs.
        key: of the record, by which heads are chosen from all layers or from the latter half.
    """

    def judge() -> Finding | None:
        groups = [records(f"inside_street_{form}_seed?") for form in (first, second)]
        found = compare(groups[0], groups[1], lambda record: float(record[key]), "points of IoU")
        places = records(PLACES)
        return found and (
            beside(found, f"places alone {100 * places[0]['mean_iou']:.1f} %") if places else found
        )

    return judge


def identity(error: Callable[[], float]) -> Callable[[], Finding]:
    """An equation, checked in float64."""

    def judge() -> Finding:
        found = error()
        return Finding(f"error below {TOLERANCE:g}", "holds" if found < TOLERANCE else "does not hold")

    return judge


def lines() -> Finding | None:
    """Points pressed onto their lines (Fig. 4): whether these are farther apart than before."""
    runs = records("small_lines_seed?")
    if not runs:
        return None
    before, after, other = (
        mean_of([run[when][key] for run in runs])
        for when, key in (
            ("before", "angle_to_own_line"),
            ("after", "angle_to_own_line"),
            ("after", "angle_to_nearest_other_line"),
        )
    )
    figure = (
        f"{before.text()} to {after.text()} degrees from the own line, {other.text()} from the nearest other "
        f"({len(runs)} draws)"
    )
    return Finding(figure, above([run["after"]["separation"] - run["before"]["separation"] for run in runs]))


def tied() -> Finding | None:
    """Test accuracy of the family's records on digits, output projection of its own against the tied one."""
    rows = {row["member"]: row["test_top1"] for row in json.loads(DIGITS.read_text())["rows"]}
    groups = [
        [{"seed": seed, "test_top1": value} for seed, value in enumerate(rows[member])]
        for member in ("cbt", "cbt_tied")
    ]
    return compare(groups[0], groups[1], top1)


def not_run(needs: str) -> Callable[[], Finding]:
    """A claim that nothing here can tell."""
    return lambda: Finding(f"not run: {needs}", "cannot be told")
