"""benchmarks/packed.py: that its three batches hold what they say, and that it measures."""

import torch

from benchmarks import packed
from cbsa_torch import CBSA
from cbsa_torch.nn import WhiteBoxBlock
from tests.helpers.compare import assert_close

SMALL = packed.Options(
    mixers=("tssa",), sequences=5, shortest=4, longest=30, dim=8, num_heads=2, depth=1, repetitions=1
)


def test_lengths_are_log_uniform():
    lengths = sorted(h * w for h, w in packed.grids(packed.Options()))
    assert len(lengths) == 64
    assert 60 <= lengths[0] <= 68
    assert 1000 <= lengths[-1] <= 1050
    assert 230 < lengths[32] < 290  # sqrt(64 * 1024) = 256
    assert 2.8 < 64 * lengths[-1] / sum(lengths) < 3.1


def test_packed_and_padded_batches_hold_the_same_tokens():
    given = packed.batches(SMALL)
    row, padded = given["packed"], given["padded"]
    padded[0].zero_()[padded[1]["token_mask"]] = row[0][0]
    torch.manual_seed(0)
    mixer = CBSA(8, 2, representatives="learned", num_representatives=4, num_prefix_tokens=1)  # needs no grid
    layers = torch.nn.ModuleList([WhiteBoxBlock(8, mixer)])
    together, apart = packed.run(layers, *row), packed.run(layers, *padded)
    assert_close(together[0], apart[padded[1]["token_mask"]], 1e-5)
    assert abs(given["equal"][0].shape[:2].numel() - row[0].shape[1]) <= SMALL.sequences


def test_every_kind_is_timed():
    rows = packed.measure_mixer(SMALL, "tssa")
    assert [row["work"] for row in rows] == ["forward", "step"]
    for row in rows:
        assert set(row["seconds"]) == set(packed.KINDS)
        assert row["over_equal"] > 0
