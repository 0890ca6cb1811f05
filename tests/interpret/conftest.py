import pytest
import timm
import torch

import cbsa_torch.models  # noqa: F401


@pytest.fixture
def model():
    options = {"embed_dim": 16, "depth": 3, "num_heads": 2, "num_representatives": 9}
    return timm.create_model("cbt_pico_patch1_8", **options).eval()


@pytest.fixture
def images():
    return torch.randn(5, 1, 8, 8)
