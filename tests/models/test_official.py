"""Released checkpoints: the same logits, from a file or a state dict."""

import pytest
import torch

from cbsa_torch.models import load_official
from tests.helpers import golden
from tests.helpers.compare import assert_close


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_logits_of_the_official_models(size):
    data, description = golden.load(f"model_cbt_{size}")
    model = load_official(golden.filled_state_dict(description))
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == description["parameters"]
    with torch.no_grad():
        assert_close(model(golden.images()), data["logits_float64"], 1e-10)
        assert_close(model.float()(golden.images().float()), data["logits_float32"], 1e-4)
