import pytest
import torch


@pytest.fixture
def images():
    return torch.randn(4, 1, 8, 8)
