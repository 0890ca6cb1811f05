import itertools
import math
import random

import pytest
import torch

from cbsa_torch.ops.lattice import Box, closest_lattice, locate, search_lattices


def brute_force(box, budget):
    """The first of the best lattices, all tried in order."""
    most = [int(min(budget, m)) if length else 1 for length, m in zip(*box, strict=True)]
    best = math.inf, None
    for lattice in itertools.product(*(range(1, m + 1) for m in most)):
        if math.prod(lattice) > budget:
            continue
        ratios = [c / length for c, length in zip(lattice, box.lengths, strict=True) if length]
        cost = max(ratios, default=1) / min(ratios, default=1) / math.prod(lattice) ** 2
        best = min(best, (cost, lattice))
    return best[1]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_closest_lattice_is_the_best_of_all(k):
    draw = random.Random(k)
    for _ in range(120):
        lengths = [
            draw.choice([0.0, draw.uniform(0.1, 9), 10 ** draw.uniform(-7, 7), float(draw.randint(1, 20))])
            for _ in range(k)
        ]
        most = [draw.choice([1e15, float(draw.randint(1, 20)), float(max(1, round(n)))]) for n in lengths]
        box, budget = Box(tuple(lengths), tuple(most)), draw.choice([1, 2, 3, 7, 16, 24, draw.randint(1, 40)])
        assert closest_lattice(box, budget) == brute_force(box, budget), (box, budget)


def test_large_budgets_do_not_try_everything():
    free = (1e15,) * 3
    assert closest_lattice(Box((3.0, 5.0), free[:2]), 2**50) == (25991151, 43318585)
    assert closest_lattice(Box((3.0, 5.0, 7.0), free), 2**50) == (66154, 110257, 154360)
    assert closest_lattice(Box((3.0, 5.0), (1e15, 3.0)), 2**50) == (2**50 // 3, 3)


def test_the_search_takes_the_last_budget_that_fits():
    """Tokens along a diagonal: a lattice of n x n cells has n occupied ones."""
    diagonal = torch.arange(1000)[:, None].expand(-1, 2)[None]
    assert search_lattices(locate(diagonal, None), 16) == [(16, 16)]


def test_distinct_places_that_no_lattice_separates():
    """The search ends though budgets could double for ever."""
    places = torch.tensor([[0.0, 1e-200, 1.0]], dtype=torch.float64)[..., None]
    (lattice,) = search_lattices(locate(places, None), 4)
    assert lattice[0] >= 2**49


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (torch.tensor([[[1.0, float("nan")]]]), "coords must be finite for every real token.*item 0"),
        (torch.tensor([[[1.0, float("inf")]]]), "coords must be finite"),
        (torch.tensor([[[-1e300], [1e300]]], dtype=torch.float64), "coords must not span more than 1e290"),
        (torch.tensor([[[-(2**63)], [2**63 - 1]]]), "coords must not span more than"),
    ],
)
def test_coordinates_without_a_place_are_named(coords, message):
    with pytest.raises(ValueError, match=message):
        locate(coords, None)
