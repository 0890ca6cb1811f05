"""The coarse lattice over tokens at coordinates: which one is laid, and which of its cells hold tokens.

A lattice divides the bounding box of an item's real tokens into equal cells. For a budget of cells it is the
one that the rule of grids gives (``ops.representative_grid``) for the sides of the box. Of the budgets M, 2 M,
4 M, ... the search takes the last with at most M occupied cells, and then the largest one that a bisection
finds below the next. No dense grid is made: occupied cells are counted by sorting.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

BISECTIONS = 10
"""Budgets tried between the last that fits of those that double and the next."""
LARGEST = 2**50
"""Budgets are not doubled beyond this: cells are numbered by int64, and sides exact in float64."""
_WIDEST = 1e290
_SLACK = 1 + 1e-13


class Box(NamedTuple):
    """The bounding box of an item's real tokens."""

    lengths: tuple[float, ...]
    """Along each axis, in a unit of the box's own; 0 where all coordinates are equal."""
    most: tuple[float, ...]
    """Cells along each axis that keep all its distinct coordinates apart: there is no use for more."""


class Layout(NamedTuple):
    """Items whose coordinates are shifted into their bounding boxes."""

    places: Tensor
    """``(B, k, N)`` float64, from 0; masked tokens lie where the first real one does."""
    reach: Tensor
    """``(B, k)`` float64, the largest of ``places``: the sides of the boxes."""


def locate(coords: Tensor, token_mask: Tensor | None) -> Layout:
    """Shift ``(B, N, k)`` coordinates, exact for integers that are at most 2^53 apart.

    Raises:
        ValueError: a real token without finite coordinates, or some too far apart.
    """
    if coords.device.type == "mps":  # which has no float64
        coords = coords.cpu()
        token_mask = None if token_mask is None else token_mask.cpu()
    axes = coords.detach().mT  # (B, k, N)
    axes = axes.to(torch.float64 if axes.is_floating_point() else torch.int64)
    if token_mask is not None:
        first = token_mask.int().argmax(-1)[:, None, None].expand(-1, axes.shape[1], 1)
        filler = axes.gather(-1, first).masked_fill(~token_mask.any(-1)[:, None, None], 0)
        axes = torch.where(token_mask[:, None], axes, filler)
    if not torch.isfinite(axes).all():
        item = int((~torch.isfinite(axes)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"coords must be finite for every real token, got NaN or infinity in item {item}")
    low, high = axes.amin(-1, keepdim=True), axes.amax(-1, keepdim=True)
    reach = (high - low).double()[..., 0]
    if not ((reach >= 0) & (reach <= _WIDEST)).all():  # integers wrap around
        raise ValueError(
            "coords must not span more than 1e290 (integers: 2^63) along an axis, "
            f"got {low.amin().item()} to {high.amax().item()}"
        )
    return Layout((axes - low).double().contiguous(), reach)


def fixed_lattices(layout: Layout, sides: Sequence[int]) -> list[tuple[int, ...]]:
    """The same lattice for every item, with one cell along axes without extent."""
    return [tuple(s if r > 0 else 1 for s, r in zip(sides, box, strict=True)) for box in layout.reach.tolist()]


def search_lattices(layout: Layout, most: int) -> list[tuple[int, ...]]:
    """For each item the finest lattice found with at most ``most`` occupied cells."""
    boxes = _boxes(layout)
    items = range(len(boxes))
    fits, fails = [most] * len(boxes), [0] * len(boxes)  # budgets; 0: none is known to fail
    tried = _try(layout, {i: closest_lattice(boxes[i], most) for i in items})
    known = [{lattice: found} for lattice, found in tried]  # by lattice: occupied cells, whether all are apart

    def fit(budgets: dict[int, int]) -> dict[int, tuple[bool, bool]]:
        """Whether budgets of items fit, and whether all distinct coordinates are in cells of their own then."""
        lattices = {i: closest_lattice(boxes[i], budget) for i, budget in budgets.items()}
        new = {i: lattice for i, lattice in lattices.items() if lattice not in known[i]}
        for i, (lattice, found) in zip(new, _try(layout, new), strict=True):
            known[i][lattice] = found
        return {i: (known[i][lattice][0] <= most, known[i][lattice][1]) for i, lattice in lattices.items()}

    growing = [i for i in items if not next(iter(known[i].values()))[1]]
    while growing:
        found = fit({i: 2 * fits[i] for i in growing})
        for i, (fitting, _) in found.items():
            if fitting:
                fits[i] *= 2
            else:
                fails[i] = 2 * fits[i]
        growing = [i for i in growing if found[i] == (True, False) and fits[i] < LARGEST]
    for _ in range(BISECTIONS):
        open_ = {i: (fits[i] + fails[i]) // 2 for i in items if fails[i] - fits[i] > 1}
        for i, (fitting, _) in fit(open_).items():
            (fits if fitting else fails)[i] = open_[i]
    return [closest_lattice(boxes[i], fits[i]) for i in items]


def cell_numbers(layout: Layout, lattices: Sequence[tuple[int, ...]]) -> Tensor:
    """The number ``(B, N)`` of each token's cell in the lattice of its item, row-major.

    Along an axis it is floor(place * cells / reach), the last cell at the end of the box.
    """
    device = layout.places.device
    cells = torch.tensor(lattices, dtype=torch.float64, device=device)[..., None]  # (B, k, 1)
    reach = layout.reach.where(layout.reach > 0, 1.0)[..., None]
    along = (layout.places * cells).div_(reach).floor_().minimum(cells - 1).long()
    number = along[:, 0]
    for axis in range(1, along.shape[1]):
        number = number * cells[:, axis].long() + along[:, axis]
    return number


def _try(
    layout: Layout, lattices: dict[int, tuple[int, ...]]
) -> list[tuple[tuple[int, ...], tuple[int, bool]]]:
    """Lattices of some items, and of each how many cells are occupied and whether distinct places are apart."""
    if not lattices:
        return []
    if len(lattices) < len(layout.reach):
        some = torch.tensor(list(lattices), device=layout.reach.device)
        layout = Layout(*(t[some] for t in layout))
    number, order = cell_numbers(layout, list(lattices.values())).sort(dim=-1, stable=True)
    same = number[:, 1:] == number[:, :-1]
    occupied = number.shape[1] - same.sum(-1)
    sorted_places = layout.places.gather(-1, order[:, None].expand(-1, layout.places.shape[1], -1))
    differ = (sorted_places[..., 1:] != sorted_places[..., :-1]).any(1)
    together = (same & differ).any(-1)
    counts = torch.stack([occupied, (~together).long()], -1).tolist()
    return [(lattice, (c, bool(a))) for lattice, (c, a) in zip(lattices.values(), counts, strict=True)]


def _boxes(layout: Layout) -> list[Box]:
    """The bounding boxes in units of the pitch, the smallest distance of coordinates along any axis.

    Boxes include the pitch of each axis: a grid of n tokens has length n, not n - 1. Grids thus have the
    lengths and limits that the rule of grids knows.
    """
    bits = (
        layout.places.view(torch.int64).sort(dim=-1, stable=True).values
    )  # ordered as the numbers, which are >= 0
    steps = F.pad(bits.view(torch.float64).diff(dim=-1), (0, 1))  # none for a single token
    pitches = steps.masked_fill_(steps == 0, math.inf).amin(-1).tolist()
    return [Box(*zip(*_sides(r, p), strict=True)) for r, p in zip(layout.reach.tolist(), pitches, strict=True)]


def _sides(reach: list[float], pitch: list[float]) -> Iterator[tuple[float, float]]:
    """Length and most cells of each axis of a box."""
    unit = max(min(pitch), max(reach) * 2**-53)
    for r, p in zip(reach, pitch, strict=True):
        if r == 0:
            yield 0.0, 1.0
            continue
        length = min(max(r / unit + p / unit, 2**-53), 2**54)
        whole = round(length)  # but for rounding of coordinates, on which ties between lattices would depend
        most = round(r / p) + 1 if r / LARGEST < p else LARGEST
        yield float(whole) if abs(length - whole) < 0.01 and whole else length, float(most)


@functools.lru_cache(maxsize=4096)
def closest_lattice(box: Box, budget: int) -> tuple[int, ...]:
    """The lattice of at most ``budget`` cells that is closest in aspect to a box: its cells along each axis.

    As ``ops.representative_grid`` it minimises (largest / smallest ratio of cells to length) / (number of
    cells)^2; of the best the first one in order. More cells along an axis always are better, so that the last
    axis has all that there is room for; what the others may have is found by walking from the best in real
    numbers until the cost of these, a convex function of each logarithm, is more than that of the best in
    integers.
    """
    axes = sorted((a for a, length in enumerate(box.lengths) if length > 0), key=lambda a: box.lengths[a])
    lengths, most = [box.lengths[a] for a in axes], [box.most[a] for a in axes]
    best: tuple[float, tuple[int, ...]] = (math.inf, ())

    def visit(sides: tuple[int, ...], room: int) -> None:
        nonlocal best
        axis = len(sides)
        if axis == len(axes) - 1:
            lattice = [1] * len(box.lengths)
            for a, side in zip(axes, (*sides, min(room, int(most[axis]))), strict=True):
                lattice[a] = side
            ratios = [lattice[a] / box.lengths[a] for a in axes]
            best = min(best, (max(ratios) / min(ratios) / math.prod(lattice) ** 2, tuple(lattice)))
            return
        limit = min(room, int(most[axis]))
        start = min(int(_real_sides(sides, lengths, most, budget)[axis]), limit)
        for step, side in ((-1, start), (1, start + 1)):
            while 1 <= side <= limit and _real_cost((*sides, side), lengths, most, budget) <= best[0] * _SLACK:
                visit((*sides, side), room // side)
                side += step

    if not axes:
        return (1,) * len(box.lengths)
    visit((), budget)
    return best[1]


def _real_cost(sides: tuple[int, ...], lengths: list[float], most: list[float], budget: int) -> float:
    """At most the cost of any lattice with these sides along the first axes."""
    real = _real_sides(sides, lengths, most, budget)
    ratios = [side / length for side, length in zip(real, lengths, strict=True)]
    return float(max(ratios) / min(ratios) / math.prod(real) ** 2)


def _real_sides(sides: tuple[int, ...], lengths: list[float], most: list[float], budget: int) -> list[float]:
    """Real numbers from 1 to ``most`` for the sides that are missing, in ratios to lengths as even as can be.

    Their product is ``budget``, or as much of it as ``most`` allows.
    """
    found: list[float] = [*sides, *(0.0 for _ in lengths[len(sides) :])]
    free = list(range(len(sides), len(lengths)))
    while free:
        room = budget / math.prod(side for side in found if side)
        even = (room / math.prod(lengths[a] for a in free)) ** (1 / len(free))
        clipped = {a: min(max(even * lengths[a], 1.0), most[a]) for a in free}
        # More than there is room for: those at the lower limit stay there; less: those at the upper.
        excess = math.prod(clipped.values()) > room
        bound = [a for a in free if (even * lengths[a] < 1 if excess else even * lengths[a] > most[a])]
        for a in bound or free:
            found[a] = clipped[a]
        free = [a for a in free if not found[a]]
    return found
