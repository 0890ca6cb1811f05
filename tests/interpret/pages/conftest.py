import functools

import pytest
import torch

from cbsa_torch import interpret
from tests.helpers.pages import build, vit


@pytest.fixture(scope="session")
def images():
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def reported(images, tmp_path_factory):
    """The model of a family and the report about it, of the model, images and a folder alone: each made once."""

    @functools.cache
    def make(family):
        torch.manual_seed(0)
        model = vit() if family == "vit" else build(family)
        return model, interpret.report(model, images, tmp_path_factory.mktemp(family))

    return make
