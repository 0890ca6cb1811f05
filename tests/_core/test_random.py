import random

import numpy as np
import pytest
import torch

from cbsa_torch._core.random import keep_random_states


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_generators_go_on_where_they_were(error):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = [draw(), draw()]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    found = [draw()]
    try:
        with keep_random_states():
            inside = draw()
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert [*found, draw()] == expected
    assert inside == expected[1]
