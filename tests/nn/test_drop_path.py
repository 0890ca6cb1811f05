import pytest
import torch

from cbsa_torch import CBSA
from cbsa_torch.nn import MHSA, Packing, ResidualBlock, WhiteBoxBlock
from cbsa_torch.nn.drop_path import DropPath
from tests.helpers.compare import assert_close


def test_updates_are_dropped_whole_and_keep_their_mean():
    layer = DropPath(0.25)
    out = layer(torch.ones(40_000, 2, 3))
    kept = out[:, 0, 0] > 0
    assert torch.equal(out, (kept / 0.75)[:, None, None].expand(-1, 2, 3))
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)  # five standard deviations
    x = torch.randn(3, 2, 4)
    assert DropPath(0.0)(x) is x
    assert layer.eval()(x) is x


def test_packed_sequences_are_dropped_each_by_itself():
    ends = torch.tensor([0, 3, 3, 4, 9])
    for cu_seqlens in (ends, Packing(ends)):
        patterns = set()
        for seed in range(30):
            torch.manual_seed(seed)
            out = DropPath(0.5)(torch.ones(1, 9, 2), cu_seqlens)[0]
            sequences = [out[0:3], out[3:4], out[4:9]]
            assert all(len(s.unique()) == 1 for s in sequences)
            patterns.add(tuple(s[0, 0].item() for s in sequences))
        assert len(patterns) == 8  # every combination


@pytest.mark.parametrize("residual", ["input", "norm"])
def test_a_layer_without_its_update(residual):
    block = WhiteBoxBlock(12, CBSA(12, 3, num_representatives=4), residual=residual, drop_path=0.9)
    x = torch.randn(1, 16, 12)
    start = block.norm1(x) if residual == "norm" else x
    update = block.attn(block.norm1(x), (4, 4))
    expected = [block.ista(block.norm2(start)), block.ista(block.norm2(start + update / 0.1))]
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        out = block(x, (4, 4))
        (which,) = [i for i in range(2) if torch.allclose(out, expected[i], atol=1e-4)]
        seen.add(which)
    assert seen == {0, 1}
    assert_close(block.eval()(x, (4, 4)), block.ista(block.norm2(start + update)), 1e-6)


def test_the_usual_layer_drops_both_updates():
    block = ResidualBlock(12, MHSA(12, 3), drop_path=0.5)
    x, seen = torch.randn(1, 4, 12), set()
    for seed in range(40):
        torch.manual_seed(seed)
        seen.add(round((block(x) - x).abs().sum().item(), 3))
    assert len(seen) == 4  # neither, one, the other, both
    assert 0.0 in seen


@pytest.mark.parametrize("rate", [1.0, -0.1, True, "a"])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match="drop_path must be at least 0 and below 1, got"):
        DropPath(rate)
