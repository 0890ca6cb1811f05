"""Examples of CBSABlock in networks of other packages: they learn, and take images of other shapes."""

import pytest
import torch
from examples import detector_neck, segmentation_head


def falls(losses):
    return sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_a_detector_with_cbsa_in_its_neck():
    model, losses = detector_neck.train(detector_neck.Options(image_size=96, steps=12, batch_size=2))
    assert falls(losses)
    assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in model.backbone.fpn.extra_blocks.blocks)
    with torch.no_grad():
        found = model.eval()([torch.rand(3, 96, 150), torch.rand(3, 80, 96)])
    assert [sorted(each) for each in found] == [["boxes", "labels", "scores"]] * 2


def test_a_segmenter_with_cbsa_in_its_head():
    model, losses = segmentation_head.train(segmentation_head.Options(image_size=48, steps=8, batch_size=2))
    assert falls(losses)
    assert model.classifier[-2].attn.qkv.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert model.eval()(torch.rand(1, 3, 40, 72))["out"].shape == (1, 2, 40, 72)


def test_a_unet_of_volumes_with_cbsa_in_its_bottleneck():
    pytest.importorskip("monai", reason="MONAI is not installed: pip install monai")
    from examples import unet3d

    model, losses = unet3d.train(unet3d.Options(volume_size=16, steps=10))
    assert falls(losses)
    with torch.no_grad():
        assert model.eval()(torch.rand(1, 1, 16, 24, 40)).shape == (1, 2, 16, 24, 40)
