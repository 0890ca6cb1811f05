"""Batch norm over all processes is, in a group of one, torch's and timm's own."""

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from cbsa_torch.train.engine.accelerate import synchronize_batch_norm


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_outputs_and_gradients_in_every_precision(group, kind, dtype):
    own = kind(3)
    other = synchronize_batch_norm(copy.deepcopy(own), torch.device("cpu"))
    assert type(other) is not type(own)
    inputs = [(5 + torch.randn(4, 3, 6, 6)).to(dtype).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    tolerance = {"rtol": 10 * torch.finfo(dtype).eps, "atol": 10 * torch.finfo(dtype).eps}
    weights = torch.randn(4, 3, 6, 6)
    outputs = []
    for norm, x in zip((own, other), inputs, strict=True):
        outputs.append(norm(x))
        (outputs[-1].float() * weights).sum().backward()
    assert outputs[0].dtype == outputs[1].dtype == dtype
    torch.testing.assert_close(*outputs, **tolerance)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **tolerance)
    for (name, first), second in zip(own.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6, msg=name)  # in float32 always
    torch.testing.assert_close(own.eval()(inputs[0]), other.eval()(inputs[0]))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_activations_of_batch_norms_stay(device):
    model = timm.create_model("efficientnet_b0", num_classes=2).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    converted = synchronize_batch_norm(model, torch.device(device)).eval()
    assert not [m for m in converted.modules() if type(m) in (nn.BatchNorm2d, BatchNormAct2d)]
    torch.testing.assert_close(converted(images), expected)
