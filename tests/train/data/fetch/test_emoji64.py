from __future__ import annotations

import hashlib

import numpy as np
import pytest

from cbsa_torch.train.data.fetch.emoji64 import PACKAGES, build, group_lookalikes, split_groups, without_gender
from tests.helpers.packages import make_emoji, make_package


def entry(unified: str, category: str = "People & Body", **more: str) -> dict:
    return {"unified": unified, "category": category, **more}


def noise(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 4), dtype=np.uint8)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1F468-200D-1F373", "1F469-200D-1F373", True),  # cooks
        ("1F9D1-200D-1F373", "1F469-200D-1F373", True),
        ("1F3C3", "1F3C3-200D-2640-FE0F", True),  # runners
        ("1F3C3-200D-2642-FE0F", "1F3C3-200D-2640-FE0F-200D-27A1-FE0F", True),
        ("1F466", "1F467", True),
        ("1F57A", "1F483", True),
        ("1F468-200D-1F373", "1F468-200D-1F33E", False),
        ("1F468", "1F466", False),
        ("1F3C3", "1F6B6", False),
        ("2640", "2642", False),
    ],
)
def test_gender_and_direction_do_not_count_all_else_does(one, other, same):
    assert (without_gender(one) == without_gender(other)) == same


def groups(emoji, *drawings):
    return group_lookalikes(emoji, drawings or [noise(len(emoji))]).tolist()


def test_drawings_that_are_close_for_one_vendor_are_joined_weighted_by_alpha():
    google, twitter = noise(4), noise(4, seed=1)
    twitter[3] = twitter[1]
    assert groups([entry(str(i), "Objects") for i in range(4)], google, twitter) == [0, 1, 2, 1]
    drawings = np.zeros((2, 64, 64, 4), np.uint8)
    drawings[1, ..., :3] = 255
    for alpha, expected in (
        (0, [0, 0]),
        (17, [0, 0]),
        (19, [0, 1]),
    ):  # RMS alpha / 255 * sqrt(3 / 4): 0.058, 0.065
        drawings[..., 3] = alpha
        assert groups([entry("A", "Objects"), entry("B", "Objects")], drawings) == expected


def test_what_replaces_another_is_joined_with_it():
    emoji = [entry("A", "Objects", obsoleted_by="C"), entry("B", "Objects"), entry("C", "Objects")]
    assert groups(emoji) == [0, 1, 0]
    emoji = [entry("A", "Objects"), entry("B", "Objects", obsoletes="A"), entry("C", "Objects", obsoletes="Z")]
    assert groups(emoji) == [0, 0, 1]


def test_gender_joins_only_people():
    codes = ["1F468", "1F469", "1F468-200D-1F373"]
    assert groups([entry(c) for c in codes]) == [0, 0, 1]
    assert groups([entry(c, "Objects") for c in codes]) == [0, 1, 2]


def by_hash(codes: list[str]) -> list[str]:
    return sorted(codes, key=lambda code: hashlib.sha256(f"emoji64/v1/{code}".encode()).hexdigest())


CODES = [f"{i:04X}" for i in range(40)]


def test_each_category_is_cut_in_the_order_of_its_hashes():
    split = split_groups(CODES, [0] * 20 + [1] * 20, list(range(40)))
    for part in (CODES[:20], CODES[20:]):
        assert [split[CODES.index(c)] for c in by_hash(part)] == [2] * 3 + [1] * 3 + [0] * 14


def test_a_group_stays_whole_is_placed_by_its_smallest_code_and_passed_over_where_it_does_not_fit():
    codes = CODES[:14]  # room for two in test, two in val
    order = [codes.index(c) for c in by_hash(codes)]
    partner = next(i for i in order[2:] if codes[i] > codes[order[1]])
    grouped = list(range(14))
    grouped[partner] = order[1]  # second, a pair: test has room for one, val takes it
    split = split_groups(codes, [0] * 14, grouped)
    third = next(i for i in order[2:] if i != partner)
    assert [split[i] for i in (order[0], order[1], partner, third)] == [2, 1, 1, 2]


def test_large_groups_and_those_across_categories_go_to_train():
    first = CODES.index(by_hash(CODES[:20])[0])  # room for six, or for three in each of two categories

    def split_of(members, labels):
        grouped = [first if i in members else i for i in range(40)]
        return {split_groups(CODES, labels, grouped)[i] for i in members}

    others = list(range(first + 1, 40))
    assert split_of([first, *others[:3]], [0] * 40) <= {1, 2}
    assert split_of([first, *others[:4]], [0] * 40) == {0}
    assert split_of([first, 39], [0] * 20 + [1] * 20) == {0}


def test_the_arrays_are_those_documented():
    emoji, drawings = make_emoji(62), noise(62)
    drawings[:, 8:16, :, 3] = 0
    files = {p.name: make_package(vendor, emoji, drawings) for vendor, p in PACKAGES.items()}
    arrays = build(files)
    kinds = {"google": "u1", "twitter": "u1", "label": "u1", "split": "u1", "fg_google": "f4", "group": "u2"}
    assert {name: arrays[name].dtype.str[1:] for name in kinds} == kinds
    texts = {"category_names", "split_names", "unified", "name", "short_name", "subcategory", "added_in"}
    assert {name for name, array in arrays.items() if array.dtype.kind == "U"} == texts
    assert set(arrays) == {*kinds, *texts, "fg_twitter"}
    # without the component and the emoji that one vendor lacks, in Unicode's order
    assert arrays["unified"].tolist() == [f"{0x1F300 + i:X}" for i in range(2, 62)]
    assert arrays["google"].shape == (60, 64, 64, 4)
    expected = drawings[::-1][2:].copy()
    expected[expected[..., 3] == 0] = 0
    np.testing.assert_array_equal(arrays["google"], expected)
    np.testing.assert_allclose(arrays["fg_google"], (expected[..., 3] > 127).mean((1, 2)), rtol=1e-6)
    assert arrays["category_names"][arrays["label"][:3]].tolist() == ["People & Body", "Flags", "Objects"]
    assert np.bincount(arrays["split"]).tolist() == [42, 9, 9]
