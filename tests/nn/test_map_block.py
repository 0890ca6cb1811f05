"""CBSABlock: norm, attention and residual on maps of one, two and three dimensions."""

import pytest
import torch
from torch import nn

from cbsa_torch import CBSABlock
from tests.helpers.compare import assert_close

GRIDS = [(11,), (5, 9), (1, 1), (3, 4, 6)]


@pytest.mark.parametrize("grid", GRIDS)
def test_norm_attention_and_residual_at_any_size(grid):
    block = CBSABlock(64, num_representatives=8).double()
    assert block.attn.num_heads == 2
    x = torch.randn(2, 64, *grid, dtype=torch.float64, requires_grad=True)
    out = block(x)
    update = block.attn(block.norm(x.movedim(1, -1)).movedim(-1, 1), token_mask=None)  # as a feature map
    assert_close(out, x + update, 1e-12)
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize(("channels", "heads"), [(8, 1), (48, 1), (96, 3), (100, 2), (256, 8)])
def test_default_heads_divide_the_channels(channels, heads):
    assert CBSABlock(channels).attn.num_heads == heads


def test_masked_positions_are_ignored_and_stay():
    block = CBSABlock(32, num_representatives=4)
    x, mask = torch.randn(1, 32, 4, 6), torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[..., :3] = True
    out = block(x, mask)
    other = torch.where(mask[:, None], x, 9.0)
    hidden = (~mask)[:, None].expand_as(x)
    torch.testing.assert_close(out[~hidden], block(other, mask)[~hidden])
    assert torch.equal(out[hidden], x[hidden])


def test_memory_formats_autocast_and_compiled():
    net = nn.Sequential(nn.Conv2d(3, 32, 3, 2), CBSABlock(32, 4, num_representatives=(2, 2))).eval()
    x = torch.randn(2, 3, 21, 33)
    expected = net(x)
    strided = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert_close(strided, expected, 1e-5)
    assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(net(x).float(), expected, 0.05)


@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_autocast(grid):
    """On the CPU it pools volumes to float32."""
    block, x = CBSABlock(32, 4, num_representatives=4), torch.randn(2, 32, *grid)
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(block(x).float(), expected, 0.05)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")
@torch.no_grad()
def test_a_traced_block_refuses_other_grids_of_as_many_positions():
    block, x = CBSABlock(32, num_representatives=4).eval(), torch.randn(2, 32, 4, 4)
    traced = torch.jit.trace(block, (x,))
    more = torch.randn(5, 32, 4, 4)
    assert_close(traced(more), block(more), 1e-6)
    for other in ((2, 8), (16, 1), (5, 5)):
        with pytest.raises(RuntimeError):
            traced(torch.randn(2, 32, *other))


def test_errors():
    with pytest.raises(ValueError, match=r"x must be a feature map \(B, 8, \*grid\).*got shape \(2, 4, 8\)"):
        CBSABlock(8)(torch.randn(2, 4, 8))
    with pytest.raises(ValueError, match="channels must be"):
        CBSABlock(0)
    with pytest.raises(ValueError, match="num_heads"):
        CBSABlock(10, 3)
    for norm in (nn.BatchNorm1d, nn.InstanceNorm1d, nn.BatchNorm2d):
        with pytest.raises(ValueError, match="norm_layer must norm the last axis.*got .*Norm"):
            CBSABlock(8, norm_layer=norm)
    with pytest.raises(TypeError, match="colour"):
        CBSABlock(8, colour=1)
